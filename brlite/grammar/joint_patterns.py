"""Bounds what a JSON schema requires of one value at once: patterns of a string and divisors of a number.

The library multiplies their automata. A value has the keywords of its subschema, of the parts of `allOf`, of targets of
references, and of alternatives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from brlite.config.options import GrammarConfig
from brlite.grammar.schema_references import SchemaRefused

PATTERNS = frozenset(("pattern", "format"))  # keywords


class _Joint(NamedTuple):
    """What one value must match: the number of patterns, and of states for its divisors. `num_read` nodes say so."""

    num_patterns: int
    num_remainders: int
    num_read: int


def check_joint_patterns(places: Iterable[tuple[str, Any]], targets: Mapping[int, Any], limits: GrammarConfig) -> None:
    """Raise `SchemaRefused` for many patterns of one string, and for large divisors of one number.

    `places` are the subschemas with their pointers, `targets` those of references, by the `id` of the node.
    """
    num_read = 0
    for pointer, node in places:
        joint = _read_joint(node, targets, limits.max_joint_patterns)
        num_read += joint.num_read
        if joint.num_remainders > limits.max_repetitions:
            reason = (
                f"one number must be a multiple of several, {joint.num_remainders} in all (grammar.max_repetitions)"
            )
        elif joint.num_patterns > limits.max_joint_patterns:
            reason = (
                f"one string must match more than {limits.max_joint_patterns} patterns at once "
                "(grammar.max_joint_patterns)"
            )
        elif num_read > 100 * limits.max_subschemas:
            reason = "references are too entangled (grammar.max_subschemas)"
        else:
            continue
        raise SchemaRefused(pointer, reason)


def _read_joint(node: Any, targets: Mapping[int, Any], max_patterns: int) -> _Joint:
    """Count what a value of this subschema must match. The count ends above `max_patterns`."""
    num_patterns, num_states, seen = 0, 1, set[int]()
    waiting: list[tuple[Any, bool]] = [(node, True)]
    while waiting and num_patterns <= max_patterns:
        each, holds = waiting.pop()  # `holds`: its patterns must match. Divisors are multiplied in any case
        if not isinstance(each, dict) or id(each) in seen:
            continue
        seen.add(id(each))
        num_patterns += holds * len(PATTERNS & each.keys())
        num_states *= num_remainders(each.get("multipleOf", 1))
        waiting += [(part, holds) for part in (*each.get("allOf", []), targets.get(id(each)))]
        for parts in filter(None, (each.get("anyOf"), each.get("oneOf"))):
            if len(parts) > 1 and all(isinstance(part, dict) and PATTERNS & part.keys() for part in parts):
                num_patterns += holds
            waiting += [(part, holds and len(parts) == 1) for part in parts]
    return _Joint(num_patterns, num_states, len(seen))


def num_remainders(divisor: float) -> int:
    """The number of states of a divisor's automaton: one for each remainder. Powers of ten need none."""
    return int("".join(map(str, Decimal(str(divisor)).normalize().as_tuple().digits)))
