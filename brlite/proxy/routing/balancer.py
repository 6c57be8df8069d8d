"""Chooses one of the upstreams that serve a model. Uses their names, weights and loads; sends nothing.

`prefix` and `sticky` use weighted rendezvous hashing: a hash of the affinity and an upstream's name gives each upstream
a number, and the largest wins. So an affinity leads to the same upstream after a restart. If an upstream is added or
removed, only the affinities that it gets or had change their upstream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b
from typing import Any, Generic, Protocol, TypeVar

from brlite.config.options import Choice

# How far above the mean load `prefix` may fill an upstream before the next in hash order is taken.
MAX_LOAD_RATIO = 1.25


class Candidate(Protocol):
    """The attributes of an upstream that the policies use."""

    name: str
    weight: int
    num_in_flight: int
    is_healthy: bool
    failed_at: float

    def is_available(self, now: float) -> bool: ...


C = TypeVar("C", bound=Candidate)


class _Slot(Generic[C]):
    """A candidate and its state in the policies."""

    __slots__ = ("candidate", "credit", "hash_key", "last_turn")

    def __init__(self, candidate: C) -> None:
        self.candidate = candidate
        self.hash_key = blake2b(candidate.name.encode(), digest_size=16).digest()
        self.credit = 0  # of round robin
        self.last_turn = 0


class Balancer(Generic[C]):
    """Chooses among `candidates` by one policy."""

    __slots__ = ("_only", "_policy", "_slots", "_turn")

    def __init__(self, choice: Choice, candidates: Sequence[C]) -> None:
        self._policy = _POLICIES[choice]
        self._slots = [_Slot(candidate) for candidate in candidates]
        self._only = candidates[0] if len(candidates) == 1 else None
        self._turn = 0

    def choose(self, now: float, affinity: bytes | None = None, tried: Collection[C] = ()) -> C | None:
        """A candidate that this request has not tried yet; None if it has tried all.

        If none of them is available, one is chosen without the policy: first those that pass their health checks, in
        turn; the one that failed most recently comes last, since a server that fails fast often has the least load.
        Without affinity, `prefix` and `sticky` choose the least loaded.
        """
        if self._only is not None:
            return None if self._only in tried else self._only
        untried = [slot for slot in self._slots if slot.candidate not in tried]
        if not untried:
            return None
        available = [slot for slot in untried if slot.candidate.is_available(now)]
        chosen: _Slot[C] = self._policy(available, affinity) if available else _unavailable_choice(untried)
        self._turn += 1
        chosen.last_turn = self._turn
        return chosen.candidate


def _unavailable_choice(slots: Sequence[_Slot[Any]]) -> _Slot[Any]:
    """One of the slots, none of which is available: in turn, so that each is tried again."""
    last_failure = max(slot.candidate.failed_at for slot in slots)

    def rank(slot: _Slot[Any]) -> tuple[bool, bool, int]:
        candidate = slot.candidate
        return not candidate.is_healthy, candidate.failed_at == last_failure > -math.inf, slot.last_turn

    return min(slots, key=rank)


def _least_loaded(slots: Sequence[_Slot[Any]], affinity: bytes | None) -> _Slot[Any]:
    """The one with the fewest requests per weight; of several, the one whose last turn is longest ago."""
    best = slots[0]
    best_load = math.inf
    for slot in slots:
        load = slot.candidate.num_in_flight / slot.candidate.weight
        if load < best_load or (load == best_load and slot.last_turn < best.last_turn):
            best, best_load = slot, load
    return best


def _round_robin(slots: Sequence[_Slot[Any]], affinity: bytes | None) -> _Slot[Any]:
    """Smooth weighted round robin, as in nginx.

    Each gains its weight as credit. The one with the most credit is chosen and loses the sum of all weights.
    """
    total = 0
    best = slots[0]
    for slot in slots:
        slot.credit += slot.candidate.weight
        total += slot.candidate.weight
        if slot.credit > best.credit:
            best = slot
    best.credit -= total
    return best


def _prefix(slots: Sequence[_Slot[Any]], affinity: bytes | None) -> _Slot[Any]:
    """The first in hash order that is not overloaded; the least loaded one never is."""
    if not affinity:
        return _least_loaded(slots, affinity)
    num_in_flight = sum(slot.candidate.num_in_flight for slot in slots)
    allowed = MAX_LOAD_RATIO * num_in_flight / sum(slot.candidate.weight for slot in slots)
    # One request more, so that the first request to an idle group goes to the first in hash order.
    return _first_in_hash_order(
        [slot for slot in slots if slot.candidate.num_in_flight <= allowed * slot.candidate.weight + 1], affinity
    )


def _sticky(slots: Sequence[_Slot[Any]], affinity: bytes | None) -> _Slot[Any]:
    """The first in hash order, at any load."""
    return _first_in_hash_order(slots, affinity) if affinity else _least_loaded(slots, affinity)


def _first_in_hash_order(slots: Sequence[_Slot[Any]], affinity: bytes) -> _Slot[Any]:
    digest = blake2b(affinity, digest_size=16).digest()

    def draw(slot: _Slot[Any]) -> float:
        """Its number for this affinity. It is the largest with a probability equal to its share of the weights."""
        bits = int.from_bytes(blake2b(digest, digest_size=8, key=slot.hash_key).digest(), "big") >> 12
        uniform = (bits + 0.5) / 2**52  # never 0 nor 1
        return float(slot.candidate.weight / -math.log(uniform))

    return max(slots, key=draw)


_POLICIES: dict[Choice, Callable[[Sequence[_Slot[Any]], bytes | None], _Slot[Any]]] = {
    "least_loaded": _least_loaded,
    "round_robin": _round_robin,
    "prefix": _prefix,
    "sticky": _sticky,
}
