"""Records the calls of brlite's own functions on the thread that runs a journey.

A coroutine counts once, when it begins, not each time it resumes. Comprehensions and generator expressions do not
count: they are lines of the function around them. Other libraries' functions do not count, and neither do tests.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType

PACKAGE = f"{Path(__file__).parents[2] / 'brlite'}/"
NOT_CALLS = frozenset({"<genexpr>", "<listcomp>", "<setcomp>", "<dictcomp>", "<module>"})
RESUME = dis.opmap.get("RESUME")


@dataclass(frozen=True)
class Call:
    file: str  # relative to brlite/
    function: str
    depth: int  # how many of our functions are on the stack below it


@dataclass
class Journey:
    calls: list[Call] = field(default_factory=list)

    @property
    def functions(self) -> set[tuple[str, str]]:
        return {(call.file, call.function) for call in self.calls}

    @property
    def files(self) -> set[str]:
        return {call.file for call in self.calls}

    def __str__(self) -> str:
        lines = [f"{len(self.calls)} calls of {len(self.functions)} functions in {len(self.files)} files"]
        file = ""
        for call in self.calls:
            shown, file = "" if call.file == file else call.file, call.file
            lines.append(f"{shown:36}{'  ' * call.depth}{call.function}")
        return "\n".join(lines)


@contextmanager
def record(*, since: tuple[str, str] | None = None, until: tuple[str, str] | None = None) -> Iterator[Journey]:
    """Record from the first call of `since` to the first call of `until`, both a file and a function; both count.

    Raises:
        AssertionError: `until` was never called, so that the journey did not arrive.
    """
    journey = Journey()
    begun, arrived = since is None, False

    def on_event(frame: FrameType, event: str, argument: object) -> None:
        nonlocal begun, arrived
        code = frame.f_code
        if event != "call" or arrived or not _is_ours(code) or not _begins(frame):
            return
        call = Call(code.co_filename[len(PACKAGE) :], _qualified_name(frame), _depth(frame))
        begun = begun or (call.file, call.function) == since
        if begun:
            journey.calls.append(call)
            arrived = (call.file, call.function) == until

    sys.setprofile(on_event)
    try:
        yield journey
    finally:
        sys.setprofile(None)
    assert begun, f"{since} was not called"
    assert arrived or until is None, f"{until} was not called:\n{journey}"


def _is_ours(code: CodeType) -> bool:
    return code.co_filename.startswith(PACKAGE) and code.co_name not in NOT_CALLS


def _begins(frame: FrameType) -> bool:
    """False for a generator or coroutine that resumes (`RESUME` has an argument then; before 3.11 it has no opcode)."""
    if RESUME is None:
        return frame.f_lasti < 0
    at, code = frame.f_lasti, frame.f_code.co_code
    return code[at] != RESUME or code[at + 1] & 3 == 0


def _qualified_name(frame: FrameType) -> str:
    if sys.version_info >= (3, 11):
        return frame.f_code.co_qualname.replace("<locals>.", "")
    owner = frame.f_locals.get("self", frame.f_locals.get("cls"))
    names = [] if owner is None else [getattr(owner, "__name__", type(owner).__name__)]
    return ".".join((*names, frame.f_code.co_name))


def _depth(frame: FrameType) -> int:
    depth, below = 0, frame.f_back
    while below is not None:
        depth += _is_ours(below.f_code)
        below = below.f_back
    return depth
