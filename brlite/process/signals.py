"""Signals as calls on the event loop's thread or as exceptions, and the duties of process 1, as `tini` does them.

In a container the command may be process 1. Orphans become its children: those of probes and `kubectl exec`, and
grandchildren whose parent has died. Only process 1 can reap them. The command itself runs in a
child process: there `subprocess` and asyncio must get the status of the children that the command has started.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

ENDING = tuple(number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None)
REPEATED_SECONDS = 1.0


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP. What handles Ctrl-C handles them too."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def terminated_by_signals() -> Iterator[None]:
    """In the block SIGTERM and SIGHUP raise `Terminated` on the main thread, as SIGINT raises KeyboardInterrupt.

    Otherwise they would end the process at once, and its temporary files would stay. Signals within a second count as
    one: wrappers such as `timeout` signal both their child and its group. A later one ends the process at once. Does
    nothing on another thread, and for a signal that is ignored, as under `nohup`, or has a handler.
    """
    first_at: float | None = None

    def end(number: int, _: FrameType | None) -> None:
        nonlocal first_at
        if first_at is None:
            first_at = time.monotonic()
            raise Terminated(number)
        if time.monotonic() > first_at + REPEATED_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    is_main = threading.current_thread() is threading.main_thread()
    taken = [number for number in ENDING if is_main and signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            if signal.getsignal(number) is end:
                signal.signal(number, signal.SIG_DFL)


def add_signal_call(loop: asyncio.AbstractEventLoop, number: signal.Signals, call: Callable[[], object]) -> None:
    """Call `call` on the loop's thread for each signal. To be called on the main thread, on Windows too."""
    try:
        loop.add_signal_handler(number, call)
    except NotImplementedError:
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(call))


def remove_signal_call(loop: asyncio.AbstractEventLoop, number: signal.Signals) -> None:
    """Restore Python's default handling of the signal."""
    try:
        loop.remove_signal_handler(number)
    except NotImplementedError:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def reset_child_signal() -> None:
    """Undo an ignored SIGCHLD, which a parent may hand down: the kernel would drop the status of each child.

    `subprocess` would take every child's status for 0, and process 1 would wait for ever. To be called on the main
    thread.
    """
    if hasattr(signal, "SIGCHLD") and signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def leave_process_1() -> None:
    """As process 1: fork, and return in the child; this process stays as its init. In any other process: do nothing.

    Call it before there are threads.
    """
    if os.getpid() != 1:
        return
    fatal = {
        signal.SIGKILL,
        signal.SIGSTOP,
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGABRT,
    }
    signals = set[int](signal.valid_signals()) - fatal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    while True:  # until the child ends
        caught = signal.sigwaitinfo(signals)
        if caught.si_signo == signal.SIGCHLD:
            pid = -1
            while pid != 0:  # reap all ended children
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == child:
                    code = os.waitstatus_to_exitcode(status)
                    os._exit(code if code >= 0 else 128 - code)
        elif caught.si_code <= 0:  # sent by a process; a terminal sends its signals to the child as well
            os.kill(child, caught.si_signo)
