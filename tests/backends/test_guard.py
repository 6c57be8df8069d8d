"""A backend that is closed at any moment, also by a signal handler on the thread that computes."""

from __future__ import annotations

import itertools
import sys
import threading
from types import CodeType, FrameType
from typing import Any

import pytest

from brlite.backends.guard import BackendGuard
from brlite.errors import EngineError

STEP: CodeType = BackendGuard.step.__wrapped__.__code__  # type: ignore[attr-defined]


def close_at(line: int) -> tuple[str, ...] | None:
    """What happens if a signal handler closes before the `line`-th line of `step`; None if it has fewer."""
    guard, events, seen = BackendGuard(), list[str](), list[int]()

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code is not STEP:
            return None
        if event == "line":
            seen.append(frame.f_lineno)
            if len(seen) == line:
                guard.close(lambda: events.append("memory is freed"))
        return trace

    def compute() -> None:
        sys.settrace(trace)
        try:
            with guard.step():
                events.append("begin")
                events.append("end")
        except EngineError as error:
            events.append(str(error))
        finally:
            sys.settrace(None)

    thread = threading.Thread(target=compute, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), f"it hangs: {seen}"
    if len(seen) < line:
        return None
    with pytest.raises(EngineError, match="closed"), guard.step():
        pass
    return tuple(events)


def test_a_signal_handler_may_close_at_any_line_of_a_step() -> None:
    fates = set(itertools.takewhile(bool, map(close_at, itertools.count(1))))

    assert fates == {("memory is freed", "the backend is closed"), ("begin", "end", "memory is freed")}
