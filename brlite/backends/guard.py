"""What protects the memory of a backend from calls at the wrong time, and in the wrong process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import NoReturn

from brlite.errors import EngineError


class BackendGuard:
    """Keeps a backend's memory from being used by two threads at once, after `close`, or in a forked child.

    A backend computes inside `with guard.step():` and gives its memory back through `guard.close`.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._is_stepping = False
        self._is_closed = False
        self._deferred = ExitStack()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Hold the backend for one step. Waits for another thread's step.

        Raises `EngineError` once the backend is closed, and in a child process that was forked from the backend's.
        """
        check_process(self._pid)
        with self._lock:
            self._is_stepping = True
            try:
                if self._is_closed:
                    raise EngineError("the backend is closed")
                yield
            finally:
                self._is_stepping = False
                self._deferred.close()

    def close(self, give_back: Callable[[], object]) -> None:
        """Refuse further steps, wait for the one under way and call `give_back`, which may be called twice.

        A signal handler may close on the very thread that computes: then the memory is given back after the step.
        In a forked child nothing is done: the threads are the parent's, and the memory ends with the child.
        """
        if os.getpid() != self._pid:
            return
        self._is_closed = True
        with self._lock:
            if self._is_stepping:  # on this thread, which has the lock already
                self._deferred.callback(give_back)
            else:
                give_back()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a backend cannot be pickled or copied: it holds memory and threads of this process")


def check_process(pid: int) -> None:
    """Raise `EngineError` in any process but `pid`, in which a model was loaded: its threads are not in a fork."""
    if os.getpid() != pid:
        raise EngineError(
            f"the model was loaded in process {pid}, and this is {os.getpid()}, a forked child, which has none of its "
            'threads; load the model in the child, or start the child by the method "spawn"'
        )
