"""Waiting with an end: work that may block, such as opening a FIFO, on a daemon thread; a time limit for a coroutine.

The interpreter joins the threads of asyncio's and concurrent.futures' pools when it exits, so a blocked one would keep
the process alive. A daemon thread ends with the process.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from brlite.errors import without_stop_iteration

T = TypeVar("T")


def start_daemon(work: Callable[[], T], name: str) -> Future[T]:
    """Run `work` on a daemon thread of its own. The future cannot be cancelled.

    Raises `RuntimeError` if no thread can be started.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            future.set_result(without_stop_iteration(work))
        except BaseException as error:  # the reader of the future gets it
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def on_daemon_thread(work: Callable[[], T], name: str) -> asyncio.Future[T]:
    """`start_daemon` for a coroutine of the running loop. Cancelling the future does not end the thread.

    A result that arrives after the loop was closed is dropped.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(done: Future[T]) -> None:
        if result.done():
            return
        if (error := done.exception()) is not None:
            result.set_exception(error)
        else:
            result.set_result(done.result())

    def hand_over(done: Future[T]) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, done)

    start_daemon(work, name).add_done_callback(hand_over)
    return result


async def within(seconds: float | None, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Cancels it after `seconds` and raises `asyncio.TimeoutError`; None sets no limit.

    Unlike `asyncio.wait_for` before Python 3.12, it loses no cancellation that comes in the same turn as the result.
    """
    task = asyncio.get_running_loop().create_task(work)
    try:
        await asyncio.wait([task], timeout=seconds)
    finally:
        task.cancel()  # which does nothing if it is done
        await asyncio.wait([task])
    if task.cancelled():
        raise asyncio.TimeoutError
    return task.result()
