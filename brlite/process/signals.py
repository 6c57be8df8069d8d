"""Signals as calls on the event loop's thread, and the duties of process 1, as `tini` does them.

In a container the command may be process 1. Orphans become its children: those of probes and `kubectl exec`, and
grandchildren whose parent has died. Only process 1 can reap them. The command itself runs in a
child process: there `subprocess` and asyncio must get the status of the children that the command has started.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio


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
