"""Runs all calls of an engine on one thread: many vendors' runtimes may only be used by the thread that opened them.

It is a daemon thread, so that an engine that loads for minutes does not keep a stopping process alive.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

from brlite.errors import EngineError

T = TypeVar("T")


class OneThread:
    """Runs functions on one thread, in the order of the calls, while the callers wait."""

    def __init__(self, name: str) -> None:
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.is_stopped = False

        def run() -> None:
            while (work := self._work.get()) is not None:
                work()

        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], T]) -> T:
        """Run `function`; returns or raises what it does. Raises `EngineError` after `stop`."""
        if self.is_stopped:
            raise EngineError("the engine is closed")
        done: Future[T] = Future()

        def work() -> None:
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

        self._work.put(work)
        return done.result()

    def stop(self) -> None:
        """End the thread after the queued calls. May be called twice."""
        if not self.is_stopped:
            self.is_stopped = True
            self._work.put(None)
            self._thread.join()
