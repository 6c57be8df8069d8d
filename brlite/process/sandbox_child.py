"""Runs an untrusted template or tokenizer in a child process (`sandbox.py`), within limits of CPU time and memory.

The kernel ends the process if a message takes too much CPU time, and bounds its memory. This file runs by its path,
under `python -I -S`: it imports the standard library only, never brlite. The work itself is in another file, the worker
script: its `create(**setup)` makes an object with `describe()` and `answer(**message)`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import struct
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any, Protocol

MAX_REASON = 300  # characters of an error

LENGTH = struct.Struct(">I")  # of a message, in bytes


class Worker(Protocol):
    """What a worker script's `create` returns."""

    def describe(self) -> dict[str, Any]:
        """The answer to the set-up message."""
        ...

    def answer(self, **message: Any) -> dict[str, Any]:
        """The answer to every later message. Its exceptions become an `error`."""
        ...


def _serve() -> None:
    setup = _receive()
    assert setup is not None, "the limits come first"
    sys.path += setup["paths"]
    for name in setup["packages"]:
        import_module(name)  # before the limits, which are for the messages
    spec = spec_from_file_location("worker", setup["script"])
    assert spec is not None, "it is the path of a Python file"
    assert spec.loader is not None, "it is the path of a Python file"
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    import resource  # Windows lacks it, and has no such child processes; there, the parent imports this file as well

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], setup["memory_bytes"]))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # its default is to end the process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    too_much = f"it needs more than {setup['memory_bytes']} bytes of memory"
    out_of_memory = encode_message({"error": too_much, "is_last": True})
    worker: Worker | None = None
    _send(encode_message({}))
    while (message := _receive()) is not None:
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
        try:
            if worker is None:
                worker = script.create(**message)
                data = encode_message(worker.describe())
            else:
                data = encode_message(worker.answer(**message))
        except MemoryError:
            data = out_of_memory
        except BaseException as error:  # a template raises Python's own; a panic of Rust is no Exception
            text = " ".join(str(error)[: 4 * MAX_REASON].split()) or type(error).__name__
            data = encode_message({"error": text if len(text) <= MAX_REASON else text[:MAX_REASON] + "…"})
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(data)
        if data is out_of_memory:
            return


def _receive() -> dict[str, Any] | None:
    """The next message; None after the sender has ended."""
    head = _read(LENGTH.size)
    body = head and _read(LENGTH.unpack(head)[0])
    return json.loads(body) if body else None


def _read(length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        # Exit when the parent has ended: a forked copy of it may keep the input open.
        ready, _, _ = select.select([0, *_PARENT], [], [])
        if 0 not in ready:
            sys.exit(0)
        part = os.read(0, min(length - len(data), 1024 * 1024))
        if not part:
            return b""
        data += part
    return bytes(data)


def encode_message(message: Mapping[str, Any]) -> bytes:
    """A message with its length before it, as both sides send it."""
    data = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return LENGTH.pack(len(data)) + data


def _send(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


if __name__ == "__main__":
    try:
        _PARENT = [os.pidfd_open(os.getppid())]
    except (AttributeError, OSError):  # before Linux 5.3, or the parent is in another PID namespace
        _PARENT = []
    _serve()
