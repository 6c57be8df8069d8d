"""Work that may wait without end, such as to open a FIFO: on a thread that nothing waits for at the end.

asyncio's own threads are joined when the loop ends, so one that waits would keep the process from ending.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def on_daemon_thread(work: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Begin the work on a thread of its own. A cancelled future leaves the thread to itself.

    Raises `RuntimeError` where no thread can be made.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # a T, where there is no error

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        if not loop.is_closed():
            try:
                loop.call_soon_threadsafe(settle, result, error)
            except RuntimeError:  # it was closed meanwhile
                return

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
