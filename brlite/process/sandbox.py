"""Runs a worker script in a child process and exchanges messages with it, within limits of time and memory.

Messages are not interpreted here. A message is a 4-byte big-endian length and that many bytes of JSON; each has one
answer. The child (`sandbox_child.py`) runs under `python -I -S`: it cannot import brlite, the user's program or modules
of the current folder, and its environment contains no keys.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from brlite.errors import EngineError
from brlite.process.children import interpreter
from brlite.process.sandbox_child import LENGTH, encode_message

START_SECONDS = 60.0  # for the interpreter to start on a busy machine
WALL_SECONDS = 60.0  # for an answer; CPU time has its own limit in the child
MAX_ANSWER_BYTES = 2**30
# Signals that a message never causes: the kernel sends them when memory is short, or a service manager does.
OTHERS_SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")  # names, since Windows lacks two
ENVIRONMENT = ("TZ", "TZDIR", "LD_LIBRARY_PATH")  # the only variables that a child inherits

# One thread and one heap: more would count towards the limit of the child's memory.
FIXED_ENVIRONMENT = {
    "LC_ALL": "C",
    "MALLOC_ARENA_MAX": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

_CHILD = Path(__file__).with_name("sandbox_child.py")


class ChildLimits(NamedTuple):
    """Limits of one message: CPU seconds, and bytes of address space of the whole child."""

    seconds: float = 2.0
    memory_bytes: int = 512 * 1024 * 1024


class _Failed(Exception):
    """The child ended before it answered. The text says why."""


class _EndedFromOutside(Exception):
    """The child was killed by another process or by the kernel for lack of memory, not because of its message."""


class ChildProcess:
    """One child, started with the first message and again after it ended. Thread-safe; messages are serialized.

    A child ends with `close`, with the last reference to this object, and with this process. A forked copy of this
    process starts a child of its own. If another process kills the child, its message is sent once more, to a new one.
    """

    def __init__(self, script: Path, packages: Sequence[str], limits: ChildLimits) -> None:
        """`script` defines the worker (`sandbox_child.py`); `packages` are its imports besides the standard library."""
        self._script = script
        self._packages = packages
        self._limits = limits
        self._setup: dict[str, Any] | None = None
        self._is_closed = False
        self._forget()

    def set_up(self, message: dict[str, Any]) -> dict[str, Any]:
        """Like `call`, with the first message of every new child: the arguments of the script's `create`."""
        self._setup = message
        return self.call(None)

    def call(self, message: dict[str, Any] | None) -> dict[str, Any]:
        """The child's answer. Its `error` says what went wrong, also if the child ended before it answered.

        Raises `EngineError` if the child cannot be started, or is killed by another process twice.
        """
        data = None if message is None else encode_message(message)  # an error here does not end the child
        if self._pid != os.getpid():
            self._forget()  # after a fork the child belongs to the parent, and the lock may be held for ever
        with self._lock:
            try:
                return self._ask(data)
            except _EndedFromOutside:
                pass
            try:
                return self._ask(data)
            except _EndedFromOutside as error:
                raise EngineError(f"a child process was {error}, not by brlite, twice in a row") from None

    def close(self) -> None:
        """End the child. Calls in progress end with an `error` at once. May be called twice."""
        self._is_closed = True
        if self._pid != os.getpid():
            return
        process = self._process
        if process is not None:
            process.kill()
        with self._lock:
            self._end()

    def _ask(self, data: bytes | None) -> dict[str, Any]:
        try:
            answer = self._started()
            if data is not None and "error" not in answer:
                answer = self._exchange(data, WALL_SECONDS)
        except _Failed as error:
            answer = {"error": str(error), "is_last": True}
        except BaseException:
            self._end()
            raise
        if answer.get("is_last"):
            self._end()
        return answer

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._setup_answer: dict[str, Any] = {}
        self._finalizer: weakref.finalize[..., ChildProcess] | None = None

    def _started(self) -> dict[str, Any]:
        """Start a child unless one runs. Returns its answer to the set-up message."""
        if self._process is not None and self._process.poll() is not None:
            self._end()
        if self._process is None:
            self._process = _spawn()
            self._finalizer = weakref.finalize(self, _kill, self._process, self._pid)
            if self._is_closed:
                raise _Failed("the model is being closed")
            paths = set()
            for name in self._packages:
                spec = find_spec(name)
                if spec is None or not spec.origin:
                    raise EngineError(f"the package {name} is not installed")
                paths.add(str(Path(spec.origin).resolve().parent.parent))
            frame = {
                "script": str(self._script),
                "paths": sorted(paths),
                "packages": list(self._packages),
                **self._limits._asdict(),
            }
            self._exchange(encode_message(frame), START_SECONDS)
            self._setup_answer = (
                {} if self._setup is None else self._exchange(encode_message(self._setup), WALL_SECONDS)
            )
        return self._setup_answer

    def _exchange(self, data: bytes, seconds: float) -> dict[str, Any]:
        assert self._process is not None, "it is started before"
        deadline = time.monotonic() + seconds
        try:
            assert self._process.stdin is not None, "it is a pipe"
            descriptor, view = self._process.stdin.fileno(), memoryview(data)
            while view:
                _wait(descriptor, select.POLLOUT, deadline)
                with suppress(BlockingIOError):
                    view = view[os.write(descriptor, view) :]
            (length,) = LENGTH.unpack(_read(self._process, LENGTH.size, deadline))
            if length > MAX_ANSWER_BYTES:
                raise _Failed(f"its process sent more than {MAX_ANSWER_BYTES} bytes")
            answer: dict[str, Any] = json.loads(_read(self._process, length, deadline))
        except (BrokenPipeError, EOFError):
            raise _Failed(self._death()) from None
        except TimeoutError:
            raise _Failed(f"its process did not answer in {seconds:g} s") from None
        return answer

    def _death(self) -> str:
        """Why the child ended while it handled a message. Raises `_EndedFromOutside` if another process killed it."""
        assert self._process is not None, "it is started before"
        if self._is_closed:
            return "the model is being closed"
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            code = 0
        if code == -signal.SIGPROF:
            return f"it takes more than {self._limits.seconds:g} s of CPU time"
        if -code in [getattr(signal, name, None) for name in OTHERS_SIGNALS]:
            raise _EndedFromOutside(f"ended by signal {-code}")
        return "its process ended" + (f" by signal {-code}" if code < 0 else "")

    def _end(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None


def _spawn() -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    try:
        process = subprocess.Popen(
            [interpreter(), "-I", "-S", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            cwd="/",
            env={**environment, **FIXED_ENVIRONMENT},
            start_new_session=True,  # the terminal's Ctrl-C must not reach the child
        )
    except (OSError, ValueError) as error:
        raise EngineError(f"a child process cannot be started: {error}") from None
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None, "both are pipes"
        os.set_blocking(pipe.fileno(), False)
    return process


def _kill(process: subprocess.Popen[bytes], pid: int) -> None:
    """Kill and reap a child; in a forked copy of the process that started it, do nothing."""
    if pid != os.getpid():
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.wait()


def _read(process: subprocess.Popen[bytes], length: int, deadline: float) -> bytes:
    assert process.stdout is not None, "it is a pipe"
    descriptor, data = process.stdout.fileno(), bytearray()
    while len(data) < length:
        _wait(descriptor, select.POLLIN, deadline)
        try:
            part = os.read(descriptor, min(length - len(data), 1024 * 1024))
        except BlockingIOError:
            continue
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError
