"""One thread beside the event loop, which tenants share in rotation: a long queue of one does not delay the others."""

from __future__ import annotations

import asyncio
import functools
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from brlite.errors import EngineError, NotReady, without_stop_iteration

T = TypeVar("T")
Jobs = OrderedDict["asyncio.Future[Any]", Callable[[], Any]]


class FairThread:
    """Runs work in turns by tenant. Used on one event loop's thread; the thread itself starts with the first work."""

    def __init__(
        self,
        name: str,
        closing: Callable[[], NotReady],
        starting: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`closing` makes the error for work that is queued at `close`, submitted after it, or fails after it.

        The thread is started inside the context `starting()`, which may set the stack size of new threads.
        """
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._closing = closing
        self._starting = starting
        self._tenants: OrderedDict[str, Jobs] = OrderedDict()
        self._is_running = False
        self._is_closed = False

    async def run(self, tenant: str, work: Callable[[], T]) -> T:
        """Run `work` when its turn comes; returns or raises what it does. Cancelling drops work that has not begun."""
        if self._is_closed:
            raise self._closing()
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._tenants.setdefault(tenant, OrderedDict())[done] = work
        self._start_next()
        try:
            return await done
        except asyncio.CancelledError:
            jobs = self._tenants.get(tenant)
            if jobs is not None and jobs.pop(done, None) is not None and not jobs:
                del self._tenants[tenant]
            raise

    def close(self) -> None:
        """Refuse queued work; the thread ends after the work under way. May be called twice and without a loop."""
        self._is_closed = True
        for jobs in self._tenants.values():
            for done in jobs:
                if not done.done() and not done.get_loop().is_closed():
                    done.set_exception(self._closing())
        self._tenants.clear()
        self._thread.shutdown(wait=False)

    def _start_next(self) -> None:
        if self._is_running or not self._tenants:
            return
        tenant, jobs = next(iter(self._tenants.items()))
        done, work = jobs.popitem(last=False)
        self._tenants.move_to_end(tenant)
        if not jobs:
            del self._tenants[tenant]
        try:
            with self._starting():
                running = asyncio.get_running_loop().run_in_executor(self._thread, without_stop_iteration, work)
        except RuntimeError as error:  # the system gives no more threads; the next work tries again
            if not done.done():
                done.set_exception(EngineError(f"no thread beside the event loop can be started: {error}"))
            return
        self._is_running = True
        running.add_done_callback(functools.partial(self._finish, done))

    def _finish(self, done: asyncio.Future[Any], running: asyncio.Future[Any]) -> None:
        self._is_running = False
        error = running.exception()
        if error is not None and self._is_closed:  # `close` may have ended a child process that the work used
            error = self._closing()
        if not done.done():
            done.set_result(running.result()) if error is None else done.set_exception(error)
        if self._tenants:
            self._start_next()
