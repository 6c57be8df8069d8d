"""Standard output and error of a server: text is put into a bounded queue, and a thread writes it.

A write to a pipe, a terminal or a disk may block for ever, and must not block the server. Lines that do not fit into
the queue, or cannot be written, are dropped and counted. The file descriptors are not changed: output of C libraries
and child processes is not queued.
"""

from __future__ import annotations

import io
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

MAX_LINES = 2048
MAX_BYTES = 512 * 1024
GATHER_SECONDS = 0.005  # lines within this time are written together: fewer thread switches
LAST_WRITE_SECONDS = 1.0  # the most that an ending command waits until its last lines are written


class QueuedStream(io.TextIOBase):
    """Replaces a text stream. `write` and `flush` return at once and never raise an `OSError`."""

    def __init__(self, stream: TextIO) -> None:
        """Write to the descriptor of `stream` in its encoding. Raises `OSError` if it has none."""
        self._descriptor = stream.fileno()
        self._encoding = stream.encoding
        self._errors = stream.errors or "backslashreplace"
        self._is_terminal = stream.isatty()
        self._partial = b""
        self._queue: deque[bytes] = deque()
        self._num_bytes = 0
        self._is_finished = False
        self._num_unreported = 0
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()  # reentrant: a signal handler may log while its thread is in `write`
        self.num_dropped = 0

    @property
    def encoding(self) -> str:  # type: ignore[override]  # read-only, as a text stream's own
        return self._encoding

    @property
    def errors(self) -> str:  # type: ignore[override]
        return self._errors

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._is_terminal

    def fileno(self) -> int:
        return self._descriptor

    def write(self, text: str) -> int:
        """Queue complete lines. An incomplete line is kept until its end or `flush`."""
        data = text.encode(self._encoding, self._errors)
        with self._changed:
            lines, newline, self._partial = (self._partial + data).rpartition(b"\n")
            if newline:
                self._put(lines + newline)
            if len(self._partial) > MAX_BYTES:
                self.flush()
        return len(text)

    def flush(self) -> None:
        """Queue the incomplete line that `write` has kept. Does not wait until it is written."""
        with self._changed:
            if self._partial:
                data, self._partial = self._partial, b""
                self._put(data)

    def finish(self, seconds: float) -> None:
        """Wait at most `seconds` until all is written. Later lines are dropped."""
        self.flush()
        with self._changed:
            self._is_finished = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(seconds)

    def _put(self, data: bytes) -> None:
        is_full = len(self._queue) >= MAX_LINES or self._num_bytes + len(data) > MAX_BYTES
        if is_full or self._is_finished:
            self._drop(data)
            return
        self._queue.append(data)
        self._num_bytes += len(data)
        self._changed.notify_all()
        if self._thread is None:
            # A daemon thread: the process can end while it waits in a write.
            self._thread = threading.Thread(target=self._write_all, name="brlite-output", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # no thread can be started; the next line tries again
                self._thread = None

    def _drop(self, data: bytes) -> None:
        num_lines = max(1, data.count(b"\n"))
        self.num_dropped += num_lines
        self._num_unreported += num_lines

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_finished)
                if not self._queue and not self._num_unreported:
                    return
            if not self._is_finished:
                time.sleep(GATHER_SECONDS)
            with self._changed:
                data = b"".join(self._queue)
                self._queue.clear()
                self._num_bytes = 0
                if self._num_unreported and (data.endswith(b"\n") or not data):
                    data += b"%d lines are missing here: they could not be written in time\n" % self._num_unreported
                    self._num_unreported = 0
            num_written = 0
            while num_written < len(data):  # without a time limit
                try:
                    num_written += os.write(self._descriptor, data[num_written:])
                except BlockingIOError:  # another process has made the open file non-blocking
                    select.select((), (self._descriptor,), ())
                except (OSError, ValueError):
                    break
            if num_written < len(data):
                with self._changed:
                    self._drop(data[num_written:])
                    if self._is_finished:
                        return


@contextmanager
def queued_output() -> Iterator[None]:
    """In the `with` block `sys.stdout` and `sys.stderr` are queued. A stream without a descriptor is not changed."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    queued = {}
    for name, stream in before.items():
        with suppress(OSError, ValueError):
            stream.flush()
            queued[name] = QueuedStream(stream)
            setattr(sys, name, queued[name])
    try:
        yield
    finally:
        for name in queued:
            setattr(sys, name, before[name])
        deadline = time.monotonic() + LAST_WRITE_SECONDS
        for output in queued.values():
            output.finish(max(0.0, deadline - time.monotonic()))


def num_dropped_lines() -> int:
    """The number of lines that were dropped from standard output and error; 0 if they are not queued."""
    return sum(stream.num_dropped for stream in (sys.stdout, sys.stderr) if isinstance(stream, QueuedStream))
