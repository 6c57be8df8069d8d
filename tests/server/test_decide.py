"""Which model is loaded or unloaded next: the policy of the model manager."""

from __future__ import annotations

from typing import Any

import pytest

from brlite.server.model_manager import IdleTime, Load, ManagedModel, Unload, decide

INFINITY = float("inf")


def loaded(name: str, num_bytes: int = 4, **fields: Any) -> ManagedModel:
    return ManagedModel(name, num_bytes, is_loaded=True, **fields)


def wanted(name: str, num_bytes: int | None = 4, since: float = 1.0) -> ManagedModel:
    return ManagedModel(name, num_bytes, is_loaded=False, wanted_since=since)


# Ten bytes of budget at second 100: which models there are, and what is to be done.
DECISIONS: dict[str, tuple[list[ManagedModel], Load | Unload | IdleTime]] = {
    "nothing to do": ([loaded("a")], IdleTime(INFINITY)),
    "no models": ([], IdleTime(INFINITY)),
    "there is room": ([loaded("a"), wanted("b")], Load("b")),
    "first come, first served": ([wanted("a", since=3), wanted("b", since=2)], Load("b")),
    "its size is not known": ([loaded("a", 10, is_busy=True), wanted("b", None)], Load("b")),
    "the least recently used goes": (
        [loaded("a", last_used=9), loaded("b", last_used=5), wanted("c")],
        Unload("b", "making room for c", ("b",)),
    ),
    "a busy one stays, however long it is": (
        [loaded("a", last_used=9), loaded("b", last_used=5, is_busy=True), wanted("c")],
        Unload("a", "making room for c", ("a",)),
    ),
    "all are busy: the one that was loaded first yields": (
        [loaded("a", is_busy=True, loaded_since=7), loaded("b", is_busy=True, loaded_since=5), wanted("c")],
        IdleTime(INFINITY, "c", ("b",)),
    ),
    "nobody goes in vain": (
        [loaded("a"), loaded("b", 6, is_busy=True), wanted("c", 5)],
        IdleTime(INFINITY, "c", ("b",)),
    ),
    "who yields goes on to, though another has become idle": (
        [loaded("a"), loaded("b", is_busy=True, is_yielding=True), wanted("c")],
        IdleTime(INFINITY, "c", ("b",)),
    ),
    "who yields and is idle goes, whoever waits for it": (
        [loaded("a", is_yielding=True, wanted_since=2.0), wanted("b", 10)],
        Unload("a", "making room for b", ("a",)),
    ),
    "who waits for a model that is loaded wants no load": ([loaded("a", 10, wanted_since=0.5)], IdleTime(INFINITY)),
    "a small one does not overtake": (
        [loaded("a", 8, is_busy=True), wanted("b", 8, since=1), wanted("c", 1, since=2)],
        IdleTime(INFINITY, "b", ("a",)),
    ),
    "those that yield go on to while an idle one expires": (
        [loaded("a", 6, is_busy=True), loaded("b", 1, last_used=5, idle_unload_seconds=30), wanted("c", 8)],
        Unload("b", "not asked for in 30 seconds", ("a",)),
    ),
    "idle for too long": (
        [loaded("a", last_used=70, idle_unload_seconds=30), wanted("b")],
        Unload("a", "not asked for in 30 seconds"),
    ),
    "soon idle for too long": ([loaded("a", last_used=90, idle_unload_seconds=30)], IdleTime(120)),
    "asked to go": ([loaded("a", last_used=99, is_dismissed=True)], Unload("a", "asked for")),
    "asked to go, but busy": ([loaded("a", is_dismissed=True, is_busy=True)], IdleTime(INFINITY)),
    "long but busy": ([loaded("a", last_used=1, idle_unload_seconds=30, is_busy=True)], IdleTime(INFINITY)),
}


@pytest.mark.parametrize(("models", "action"), DECISIONS.values(), ids=DECISIONS)
def test_what_is_decided(models: list[ManagedModel], action: Load | Unload | IdleTime) -> None:
    assert decide(models, budget_bytes=10, now=100) == action
