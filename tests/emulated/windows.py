"""Takes from Python what Windows lacks, then imports every file of brlite (`imports`), or runs a command.

Run as a program of its own. What Windows does otherwise (paths, locks, console) is not emulated.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import pkgutil
import signal
import subprocess
import sys
from importlib.abc import MetaPathFinder
from typing import Any

MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "termios", "tty", "uvloop"}
FUNCTIONS = [
    "O_CLOEXEC",
    "O_DIRECTORY",
    "O_NOFOLLOW",
    "O_NONBLOCK",
    "fchmod",
    "fork",
    "geteuid",
    "getgid",
    "getpgid",
    "getuid",
    "killpg",
    "mkfifo",
    "pread",
    "preadv",
    "posix_fadvise",
    "sched_getaffinity",
    "setsid",
    "statvfs",
    "sysconf",
    "waitid",
]
SIGNALS = ["SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGPROF", "SIGQUIT", "SIGSTOP", "SIGUSR1", "SIGUSR2"]
SIGNAL_FUNCTIONS = ["pthread_sigmask", "setitimer", "sigwait", "sigwaitinfo"]


class Lacking(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def no_signal_handlers(self: object, *args: object) -> None:
    raise NotImplementedError


def take_away() -> None:
    """To be called when the standard library's own imports are done: it has other files for Windows."""
    import ctypes
    import logging.handlers
    import multiprocessing
    import shutil
    import socket
    import ssl
    import tempfile

    assert all((asyncio, ctypes, logging, multiprocessing, shutil, socket, ssl, subprocess, tempfile))
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.meta_path.insert(0, Lacking())
    for place, names in ((os, FUNCTIONS), (signal, [*SIGNALS, *SIGNAL_FUNCTIONS])):
        for name in names:
            if hasattr(place, name):
                delattr(place, name)
    loop: Any = asyncio.SelectorEventLoop
    loop.add_signal_handler = loop.remove_signal_handler = no_signal_handlers


def import_all() -> None:
    import brlite

    for module in pkgutil.walk_packages(brlite.__path__, "brlite."):
        if module.name.endswith(("__main__", "._native", ".ray_serve")):  # Ray itself has other files for Windows
            continue
        try:
            importlib.import_module(module.name)
        except Exception as error:
            if getattr(error, "name", None) not in ("argparse_manpage", "torch", "triton"):  # those of extras
                print(f"{module.name}: {error!r}")


if __name__ == "__main__":
    take_away()
    if sys.argv[1:] == ["imports"]:
        import_all()
    else:
        from brlite.commands.cli import main

        sys.exit(main(sys.argv[1:]))
