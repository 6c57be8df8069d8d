"""Walks a JSON schema before it is compiled: bounds its cost, refuses what cannot be enforced, rewrites some keywords.

llguidance does not report the place of an error, and it cannot be interrupted while it compiles. So the walk names the
place as a JSON pointer, and bounds everything that makes compiling slow. It follows references from the root (see
`schema_references.py`); a subschema without a reference to it is not checked. The schema is changed in place, and no
part of it moves, so references stay valid.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any, NamedTuple

from brlite.config.options import GrammarConfig
from brlite.grammar.joint_patterns import check_joint_patterns, num_remainders
from brlite.grammar.patterns import (
    FORMAT_PATTERNS,
    PatternRefused,
    name_pattern,
    pattern_size,
    rewritten,
    with_plain_classes,
)
from brlite.grammar.schema_references import SchemaReferences, SchemaRefused, escape

EXACT = 2**53  # integers up to here are exact as doubles, which the library uses for numbers
MAX_EXPONENT = 22  # powers of ten up to here are exact as doubles
BOUND_DIGITS = 15  # of a bound, as the library writes it
SMALLEST = 1e-20  # of the bounds that are handed over; others become this or 0
STEP_PLACES = 9  # from an exclusive bound to the inclusive one that replaces it: 1e-9
MAX_NESTING = 100  # levels of JSON; the library stops at 128
MAX_COMPARED = 100_000  # pairs of alternatives of `oneOf`, and their listed values: 0.2 s
MAX_EXPANDED_ARRAYS = 400  # arrays that replace `uniqueItems` over a short enum
MAX_WRITTEN = 256 * 1024  # characters that rewriting may add to a schema
TYPES = ("null", "boolean", "object", "array", "number", "string", "integer")
FORMATS = frozenset(
    ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
)  # that are enforced; others are annotations

# Names in ASCII are among those that the formats for all scripts allow.
ASCII_FORMATS = {"idn-email": "email", "idn-hostname": "hostname", "iri": "uri"}

_LISTS = ("prefixItems", "anyOf", "allOf", "oneOf")
_MAPS = ("properties", "patternProperties")
_SINGLE = ("items", "additionalItems", "additionalProperties")
_NOT_ENFORCED = (
    *("not", "if", "contains", "propertyNames", "dependencies", "dependentRequired", "dependentSchemas"),
    *("unevaluatedProperties", "unevaluatedItems", "uniqueItems", "$dynamicRef", "$recursiveRef"),
)
_ANNOTATIONS = ("x-guidance", "default", "examples", "example")
_SIZES = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


class WalkedSchema(NamedTuple):
    """A schema ready to be compiled, and its subschemas, to find the place of a compiler's error."""

    schema: Any
    places: list[tuple[str, dict[str, Any]]]  # every subschema with its pointer

    def with_keyword(self, *keywords: str) -> list[str]:
        """The pointers of the subschemas that have one of the keywords."""
        return [at for at, node in self.places if any(keyword in node for keyword in keywords)]


def parse_schema(text: str) -> Any:
    """The schema in a JSON text. Raises `SchemaRefused`."""

    def refuse(constant: str) -> Any:
        raise SchemaRefused("#", f"{constant} is not JSON")

    try:
        schema = json.loads(text, parse_constant=refuse)
        json.dumps(schema, ensure_ascii=False, allow_nan=False).encode()  # raises for lone surrogates and for 1e999
    except RecursionError:
        raise SchemaRefused("#", f"the schema is nested more than {MAX_NESTING} levels deep") from None
    except ValueError as error:
        if isinstance(error, SchemaRefused):
            raise
        raise SchemaRefused("#", f"the schema is not JSON: {error}") from None
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise SchemaRefused("#", "a schema is an object; one that is false allows nothing")
    return schema


def walk_schema(schema: Any, limits: GrammarConfig) -> WalkedSchema:
    """Check and rewrite a schema. Raises `SchemaRefused`, also for one beyond the `limits`."""
    walk = _Walk(schema, limits)
    walk.run()
    return WalkedSchema(schema, list(walk.places.values()))


class _Walk:
    def __init__(self, root: Any, limits: GrammarConfig) -> None:
        self.places: dict[int, tuple[str, dict[str, Any]]] = {}  # by `id`, which stays valid as `_root` is referenced
        self._root = root
        self._references: SchemaReferences  # made once the nesting is bounded
        self._limits = limits
        self._targets: dict[int, Any] = {}  # of each node with a `$ref`
        self._names: dict[str, int] = {"": id(root)}  # the identity of each subschema with an `$id` or `$anchor`
        self._num_repetitions = 0
        self._num_compared = 0
        self._num_written = 0

    def run(self) -> None:
        level: list[Any] = [self._root]
        for _ in range(MAX_NESTING):
            level = [child for node in level for child in _children(node)]
        if level:
            raise SchemaRefused("#", f"the schema is nested more than {MAX_NESTING} levels deep")
        self._references = SchemaReferences(self._root)
        waiting: list[tuple[str, Any, int]] = [("#", self._root, 0)]
        while waiting:
            pointer, node, depth = waiting.pop()
            if id(node) in self.places and isinstance(node, dict):
                continue
            if depth > self._limits.max_references:
                raise SchemaRefused(
                    pointer, f"references lead more than {self._limits.max_references} deep (grammar.max_references)"
                )
            waiting += reversed(list(self._visit(pointer, node, depth)))
        self._check_ends()
        check_joint_patterns(self.places.values(), self._targets, self._limits)
        for _, node in self.places.values():
            if "oneOf" in node:  # `_drop_harmless` has checked that no value matches two alternatives
                node.setdefault("allOf", []).append({"anyOf": node.pop("oneOf")})
            if node.get("format") in FORMAT_PATTERNS:
                node.setdefault("allOf", []).append({"pattern": FORMAT_PATTERNS[node["format"]]})

    def _visit(self, pointer: str, node: Any, depth: int) -> Iterator[tuple[str, Any, int]]:
        """Check and rewrite one subschema. Yield those below it: pointer, subschema, depth of references."""
        if isinstance(node, bool):
            return
        if not isinstance(node, dict):
            raise SchemaRefused(pointer, "a schema is an object, true or false")
        self.places[id(node)] = pointer, node
        if len(self.places) > self._limits.max_subschemas:
            raise SchemaRefused(
                pointer, f"the schema has more than {self._limits.max_subschemas} subschemas (grammar.max_subschemas)"
            )
        base = self._references.base_of(node).rstrip("#")
        for keyword, name in (("$id", base), ("$anchor", f"{base}#{node.get('$anchor')}")):
            if keyword in node and self._names.setdefault(name, id(node)) != id(node):  # the library would mix them up
                raise SchemaRefused(f"{pointer}/{keyword}", "another subschema has the same name")
        for keyword in _ANNOTATIONS:
            node.pop(keyword, None)
        self._drop_harmless(pointer, node)
        self._check_keywords(pointer, node)
        for keyword in _NOT_ENFORCED:
            if keyword in node:
                raise SchemaRefused(f"{pointer}/{escape(keyword)}", f"{keyword} is not enforced by this server")
        if "$ref" in node:
            target_pointer, target = self._references.resolve(pointer, node)
            self._targets[id(node)] = target
            yield target_pointer, target, depth + 1
        for keyword in _SINGLE:
            if isinstance(node.get(keyword), (dict, bool)):
                yield f"{pointer}/{keyword}", node[keyword], depth
        for keyword in (*_LISTS, "items"):
            value = node.get(keyword)
            if keyword in _LISTS and keyword in node and not isinstance(value, list):
                raise SchemaRefused(f"{pointer}/{keyword}", f"{keyword} is a list of schemas")
            if isinstance(value, list):
                yield from ((f"{pointer}/{keyword}/{index}", child, depth) for index, child in enumerate(value))
        for keyword in _MAPS:
            for name, child in _mapping(pointer, node, keyword).items():
                yield f"{pointer}/{keyword}/{escape(name)}", child, depth

    def _drop_harmless(self, pointer: str, node: dict[str, Any]) -> None:
        """Drop or rewrite keywords that llguidance does not support, if the same values stay valid."""
        if not isinstance(node.get("format", ""), str):
            raise SchemaRefused(f"{pointer}/format", "a format is a string")
        node["format"] = ASCII_FORMATS.get(node.get("format", ""), node.get("format"))
        if node["format"] not in FORMATS:
            del node["format"]
        if node.get("dependentRequired") == {} or node.get("dependentSchemas") == {}:
            node.pop("dependentRequired", None), node.pop("dependentSchemas", None)
        for keyword in ("unevaluatedProperties", "unevaluatedItems", "propertyNames"):
            if node.get(keyword) is True or node.get(keyword) == {}:
                del node[keyword]
        if node.get("uniqueItems") is False:
            del node["uniqueItems"]
        if "if" not in node or not {"then", "else"} & node.keys():
            node.pop("if", None), node.pop("then", None), node.pop("else", None)
        if "contains" not in node:
            node.pop("minContains", None), node.pop("maxContains", None)
        if not isinstance(node.get("items"), list):  # the library would ignore `prefixItems` beside it
            node.pop("additionalItems", None)
        is_plain = not {"allOf", "anyOf", "oneOf", "$ref"} & node.keys()
        if is_plain and isinstance(node.get("unevaluatedProperties"), (dict, bool)):
            node.setdefault("additionalProperties", node.pop("unevaluatedProperties"))
        self._rewrite_property_names(node)
        for bound in ("Minimum", "Maximum"):  # a boolean in draft 4
            is_exclusive, plain = node.get(f"exclusive{bound}"), bound.lower()
            if isinstance(is_exclusive, bool):
                del node[f"exclusive{bound}"]
                if is_exclusive and plain in node:
                    node[f"exclusive{bound}"] = node.pop(plain)
        alternatives = node.get("oneOf")
        # llguidance would multiply the alternatives with one another to check this, in unbounded time and memory.
        if isinstance(alternatives, list) and not self._are_disjoint(pointer, alternatives):
            reason = "the alternatives cannot be told apart; use anyOf, or a required property with different const"
            raise SchemaRefused(f"{pointer}/oneOf", reason)
        if node.get("uniqueItems") is True:
            self._expand_unique_items(pointer, node)

    def _rewrite_property_names(self, node: dict[str, Any]) -> None:
        """Drop `propertyNames` of any string. Rewrite an enum as `properties`, what a pattern says as
        `patternProperties`."""
        names = node.get("propertyNames")
        if not isinstance(names, dict):
            return
        said = {key: value for key, value in names.items() if key not in ("title", "description", "$comment")}
        if not isinstance(said.get("format", ""), str):
            return
        if said.get("format") not in FORMATS:  # a note
            said.pop("format", None)
        pattern = name_pattern(said)
        if pattern == "":
            del node["propertyNames"]
        elif pattern is not None:
            if not {"properties", "patternProperties"} & node.keys() and node.get("required", []) == []:
                node["patternProperties"] = {pattern: node.get("additionalProperties", True)}
                node["additionalProperties"] = False
                del node["propertyNames"]
        elif said.keys() <= {"type", "enum"} and isinstance(said.get("enum"), list):
            is_open = not {"properties", "patternProperties"} & node.keys()
            value = json.dumps(node.get("additionalProperties", True))
            is_short = self._may_write(len(said["enum"]) * len(value))
            if is_open and is_short and all(isinstance(name, str) for name in said["enum"]):
                node["properties"] = {name: json.loads(value) for name in said["enum"]}
                node["additionalProperties"] = False
                del node["propertyNames"]

    def _may_write(self, num_characters: int) -> bool:
        """Whether rewriting may add `num_characters` to the schema. If so, counts them."""
        is_allowed = self._num_written + num_characters <= MAX_WRITTEN
        self._num_written += num_characters if is_allowed else 0
        return is_allowed

    def _check_keywords(self, pointer: str, node: dict[str, Any]) -> None:
        types = node.get("type", [])
        for name in types if isinstance(types, list) else [types]:
            if name not in TYPES:
                raise SchemaRefused(f"{pointer}/type", f"{json.dumps(name)[:40]} is not one of {', '.join(TYPES)}")
        for keyword in _SIZES:
            value = node.get(keyword, 0)
            if isinstance(value, float) and value.is_integer():
                node[keyword] = value = int(value)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
                raise SchemaRefused(f"{pointer}/{keyword}", f"{keyword} is an integer from 0 to {2**31 - 1}")
        self._check_numbers(pointer, node)
        if "enum" in node and not (isinstance(node["enum"], list) and node["enum"]):
            raise SchemaRefused(f"{pointer}/enum", "enum is a list of at least one value")
        for keyword in ("enum", "const"):
            if keyword in node and _has_inexact_number(node[keyword]):
                raise SchemaRefused(
                    f"{pointer}/{keyword}",
                    f"numbers beyond ±{EXACT}, of more than 15 digits, or with an exponent beyond ±{MAX_EXPONENT} "
                    "are not enforced exactly",
                )
        named = {with_plain_classes(key): child for key, child in _mapping(pointer, node, "patternProperties").items()}
        if len(named) < len(node.get("patternProperties", {})):
            raise SchemaRefused(f"{pointer}/patternProperties", "the same pattern comes twice, but for its escapes")
        if False in node.get("patternProperties", {}).values() and node.get("additionalProperties") is not False:
            raise SchemaRefused(f"{pointer}/patternProperties", "a pattern of no properties is not enforced")
        if named:
            node["patternProperties"] = named
        patterns = [*named]
        if "pattern" in node:
            if not isinstance(node["pattern"], str):
                raise SchemaRefused(f"{pointer}/pattern", "a pattern is a string")
            node["pattern"] = with_plain_classes(node["pattern"])
            if rewritten(node["pattern"]) != node["pattern"]:
                node["pattern"] = rewritten(node["pattern"])
                if node.get("format") == "email":
                    del node["format"]  # the pattern is stricter
            patterns.append(node["pattern"])
        for pattern in patterns:
            place = f"{pointer}/pattern" if "pattern" in node else f"{pointer}/patternProperties"
            try:
                size = pattern_size(pattern)
            except PatternRefused as error:
                raise SchemaRefused(place, f"the pattern {error}") from None
            self._count(place, size, "the pattern, with its repetitions written out,")
        self._check_properties(pointer, node)

    def _check_numbers(self, pointer: str, node: dict[str, Any]) -> None:
        """Check the bounds and the divisor of numbers. Bounds beyond the exact numbers are narrowed to these."""
        for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"):
            value = node.get(keyword, 0)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < math.inf:
                raise SchemaRefused(f"{pointer}/{keyword}", f"{keyword} is a number")
            if keyword == "multipleOf" and keyword in node:
                if value <= 0:
                    raise SchemaRefused(f"{pointer}/multipleOf", "multipleOf is a number above 0")
                # The automaton has a state for each remainder: 9999991 took three minutes. Powers of ten need none.
                self._count(f"{pointer}/multipleOf", num_remainders(value), "the number")
            is_lower = keyword.endswith("inimum")
            # For integers the library adds 1 to an exclusive bound.
            most = EXACT - (keyword.startswith("exclusive") and "number" not in _type_names(node))
            if keyword != "multipleOf" and abs(value) > most:
                if (value < 0) != is_lower:
                    raise SchemaRefused(f"{pointer}/{keyword}", f"bounds beyond ±{EXACT} are not enforced exactly")
                node[keyword] = -EXACT if is_lower else EXACT
            elif keyword != "multipleOf" and isinstance(value, float):
                node[keyword] = int(value) if value.is_integer() else _inward(value, is_lower=is_lower)
        if "number" in _type_names(node):
            _make_inclusive(node)

    def _count(self, pointer: str, size: int, what: str) -> None:
        """Add to the size of the schema's automata, and refuse one that exceeds the bound."""
        self._num_repetitions += size
        if self._num_repetitions > self._limits.max_repetitions:
            most = self._limits.max_repetitions
            raise SchemaRefused(
                pointer,
                f"{what} counts {size}; all patterns and multipleOf may count {most} in all (grammar.max_repetitions)",
            )

    def _check_properties(self, pointer: str, node: dict[str, Any]) -> None:
        properties, required = _mapping(pointer, node, "properties"), node.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise SchemaRefused(f"{pointer}/required", "required is a list of names")
        names = set(required)
        for num, most, what in (
            (len(properties.keys() | names), self._limits.max_properties, "properties"),
            (len(properties.keys() - names), self._limits.max_optional_properties, "optional properties"),
        ):
            if num > most:
                key = f"grammar.max_{what.replace(' ', '_')}"
                raise SchemaRefused(
                    f"{pointer}/properties", f"{num} {what}; an object may have at most {most} here ({key})"
                )

    # Rewriting

    def _are_disjoint(self, pointer: str, alternatives: list[Any]) -> bool:
        """Whether no value can match two alternatives, so that oneOf equals anyOf. False if that is not known."""
        nodes = [self._references.follow(pointer, alternative) for alternative in alternatives]
        if not all(isinstance(node, dict) for node in nodes):
            return False
        self._compare(pointer, sum(map(_num_listed, nodes)))
        values = [_values(node) for node in nodes]
        listed = [own.keys() for own in values if own is not None]
        if len(listed) == len(values):
            return len(set[str]().union(*listed)) == sum(map(len, listed))
        self._compare(pointer, len(nodes) ** 2)
        kinds: list[set[str]] = []  # the types of value that each alternative allows, numbers and integers as one
        for node, own in zip(nodes, values, strict=True):
            types = node.get("type", TYPES) if own is None else [_type(value) for value in own.values()]
            names = [types] if isinstance(types, str) else types if isinstance(types, (list, tuple)) else TYPES
            kinds.append({"number" if name == "integer" else str(name) for name in names})
        tags = [self._tags(pointer, node) for node in nodes]
        return all(
            not kinds[i] & kinds[j]
            or _are_distinct(values[i], values[j])
            or any(_are_distinct(tags[i][tag], tags[j][tag]) for tag in tags[i].keys() & tags[j].keys())
            for i, j in itertools.combinations(range(len(nodes)), 2)
        )

    def _tags(self, pointer: str, node: dict[str, Any]) -> dict[str, dict[str, Any] | None]:
        """The required properties of an object schema, each with its listed values."""
        schemas = [(name, self._references.follow("#", node["properties"][name])) for name in _names(node)]
        self._compare(pointer, sum(_num_listed(schema) for _, schema in schemas))
        return {name: _values(schema) for name, schema in schemas} if node.get("type") == "object" else {}

    def _compare(self, pointer: str, num: int) -> None:
        """Count comparisons of alternatives, and refuse too many."""
        self._num_compared += num
        if self._num_compared > MAX_COMPARED:
            raise SchemaRefused(f"{pointer}/oneOf", "there are too many alternatives and values to compare; use anyOf")

    def _expand_unique_items(self, pointer: str, node: dict[str, Any]) -> None:
        """Replace `uniqueItems` over few values by an enum of all arrays that have each value at most once."""
        most = node.get("maxItems")
        if isinstance(most, int) and most <= 1:
            del node["uniqueItems"]
            return
        items = self._references.follow(f"{pointer}/items", node.get("items"))
        only = {"type", "items", "minItems", "maxItems", "uniqueItems", "title", "description", "$defs", "$schema"}
        if node.get("type") != "array" or not node.keys() <= only or not isinstance(items, dict):
            return
        values = _values(items)
        if values is None or not items.keys() <= {"type", "enum", "const", "title", "description"}:
            return
        sizes = range(node.get("minItems", 0), min(len(values), len(values) if most is None else most) + 1)
        num_arrays = num_values = 0
        for size in sizes:  # stops early: the numbers would be huge for many values
            num_arrays += math.perm(len(values), size)
            num_values += math.perm(len(values), size) * size
            if num_arrays > MAX_EXPANDED_ARRAYS:
                return
        if not sizes or not self._may_write(num_values * max(map(len, values), default=0)):
            return
        arrays = [list(each) for size in sizes for each in itertools.permutations(values.values(), size)]
        for keyword in ("type", "items", "minItems", "maxItems", "uniqueItems"):
            node.pop(keyword, None)
        node["enum"] = arrays

    # Checks of the whole schema

    def _check_ends(self) -> None:
        """Refuse a schema that no finite value matches: a required part contains itself."""
        finite: set[int] = set()

        def is_finite(child: Any) -> bool:
            return not isinstance(child, dict) or id(child) in finite

        num_looks = 0
        pending = list(self.places.values())[::-1]
        while pending:
            left = []
            for pointer, node in pending:
                if "enum" in node or "const" in node or self._has_finite_value(node, is_finite):
                    finite.add(id(node))
                else:
                    left.append((pointer, node))
            num_looks += len(pending)
            if len(left) == len(pending):
                raise SchemaRefused(left[-1][0], "what is required here leads back to itself and never ends")
            if num_looks > 100 * self._limits.max_subschemas:
                raise SchemaRefused(left[-1][0], "references are too entangled (grammar.max_subschemas)")
            pending = left

    def _has_finite_value(self, node: dict[str, Any], is_finite: Callable[[Any], bool]) -> bool:
        """Whether a finite value matches, given `is_finite` for the subschemas."""
        if not is_finite(self._targets.get(id(node))) or not all(map(is_finite, node.get("allOf", []))):
            return False
        for keyword in ("anyOf", "oneOf"):
            if keyword in node and not any(map(is_finite, node[keyword])):
                return False
        types = _type_names(node)
        if types - {"object", "array"}:
            return True
        if "array" in types:
            items = node.get("items", True)
            first = node.get("prefixItems", items if isinstance(items, list) else [])
            rest = node.get("additionalItems", True) if isinstance(items, list) else items
            if all(map(is_finite, [*first, rest][: node.get("minItems", 0)])):
                return True
        properties = node.get("properties", {})
        return "object" in types and all(is_finite(properties.get(name)) for name in node.get("required", []))


def _inward(bound: float, *, is_lower: bool) -> float:
    """The nearest number within a bound of which the library reads all digits. Whole ones are better as integers."""
    if 0 < abs(bound) < SMALLEST:  # the library would write all zeros of it
        return math.copysign(SMALLEST, bound) if is_lower == (bound > 0) else 0
    context = Context(prec=BOUND_DIGITS, rounding=ROUND_CEILING if is_lower else ROUND_FLOOR)
    return float(context.create_decimal(repr(bound)))


def _make_inclusive(node: dict[str, Any]) -> None:
    """Replace a number's exclusive bound that is an integer by an inclusive one a little inside.

    If two bounds are less than 1 apart, the library allows the one that is nearer to 0, though it is exclusive. Bounds
    that leave nothing stay as they are: its error names the keywords.
    """
    lowest = max((node[keyword] for keyword in ("minimum", "exclusiveMinimum") if keyword in node), default=-math.inf)
    highest = min((node[keyword] for keyword in ("maximum", "exclusiveMaximum") if keyword in node), default=math.inf)
    if lowest >= highest:
        return
    for sign, keyword, exclusive, narrower in (
        (1, "minimum", "exclusiveMinimum", max),
        (-1, "maximum", "exclusiveMaximum", min),
    ):
        bound = node.get(exclusive)
        if bound is not None and 0 <= sign * bound < EXACT and bound == int(bound):
            del node[exclusive]
            places = max(0, min(STEP_PLACES, BOUND_DIGITS - len(str(abs(int(bound))))))
            inside = int(bound) + sign * 10**-places
            node[keyword] = narrower(node.get(keyword, inside), inside)


def _children(node: Any) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


def _mapping(pointer: str, node: Mapping[str, Any], keyword: str) -> dict[str, Any]:
    value = node.get(keyword, {})
    if not isinstance(value, dict):
        raise SchemaRefused(f"{pointer}/{keyword}", f"{keyword} is an object of schemas")
    return value


def _names(node: Mapping[str, Any]) -> Iterator[str]:
    """The required properties that have a schema."""
    properties, required = node.get("properties"), node.get("required")
    if isinstance(properties, dict) and isinstance(required, list):
        yield from (name for name in required if isinstance(name, str) and isinstance(properties.get(name), dict))


def _values(node: Mapping[str, Any]) -> dict[str, Any] | None:
    """The values that a schema lists, by a text that is the same for equal JSON values; None if it lists none."""
    if isinstance(node.get("enum"), list):
        values = node["enum"]
    elif "const" in node:
        values = [node["const"]]
    else:
        values = {"boolean": [False, True], "null": [None]}.get(str(node.get("type")))
    if values is None:
        return None
    allowed = _type_names(node)
    allowed |= {"integer"} if "number" in allowed else set()
    return {_key(value): value for value in values if _type(value) in allowed}


def _type_names(node: Mapping[str, Any]) -> set[str]:
    """The types that a schema names; all if it names none. Wrong names are refused when the schema is visited."""
    types = node.get("type", TYPES)
    return {name for name in (types if isinstance(types, (list, tuple)) else [types]) if isinstance(name, str)}


def _are_distinct(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    return one is not None and other is not None and one.keys().isdisjoint(other.keys())


def _num_listed(node: Any) -> int:
    values = node.get("enum") if isinstance(node, dict) else None
    return len(values) if isinstance(values, list) else 1


def _key(value: Any) -> str:
    def plain(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: plain(each) for key, each in part.items()}
        if isinstance(part, list):
            return [plain(each) for each in part]
        return int(part) if isinstance(part, float) and part.is_integer() else part

    return json.dumps(plain(value), sort_keys=True)


def _type(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    names = {type(None): "null", int: "integer", str: "string", list: "array", dict: "object"}
    return names[type(value)]


def _has_inexact_number(value: Any) -> bool:
    """Whether the library may read a number of `value` as another one.

    It rounds once for the digits and once for the power of ten, so both must be exact (Clinger, "How to Read Floating
    Point Numbers Accurately", 1990).
    """
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, (int, float)) and not abs(part) <= EXACT:
            return True
        if isinstance(part, float):
            _, digits, exponent = Decimal(repr(part)).as_tuple()
            if int("".join(map(str, digits))) > EXACT or abs(int(exponent)) > MAX_EXPONENT:
                return True
        waiting += _children(part)
    return False
