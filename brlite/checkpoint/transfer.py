"""Fetches the files of a download: several at once, large ones in segments, each resumed where it stopped.

An unfinished file has the suffix `PART_SUFFIX`. A second file counts the bytes of each of its segments, so that the
next start fetches only the rest. The hash of a complete file is checked before the file gets its name.
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

from brlite.checkpoint.hub_http import DEFAULT_RETRIES, PassingFailure, Retries, read_some, wait_before
from brlite.checkpoint.progress import OnProgress, SizedStage
from brlite.checkpoint.repository import COUNTS_SUFFIX, PART_SUFFIX
from brlite.errors import ModelError, ModelUnreachable
from brlite.files.new_file import write_at
from brlite.files.quoting import excerpt, one_line
from brlite.process.waiting import start_daemon

SEGMENT_BYTES = 64 * 2**20
CHUNK_BYTES = 2**20
NUM_THREADS = 8
REPORT_SECONDS = 0.1
HASH = re.compile(r"[0-9a-f]{40,64}")  # a hub's hash becomes the name of a file, so its form is checked

NUMBER_BYTES = 8  # of a number in the file of counts: the file's bytes, a segment's bytes, then each segment's count


class HubFile(NamedTuple):
    """A file in a hub's list. The list has its sha256, or git's hash of it, or neither."""

    name: str
    num_bytes: int
    sha256: str | None = None
    git_hash: str | None = None

    @property
    def key(self) -> str:
        """The name of its content in the cache: a hash."""
        known_hash = self.sha256 or self.git_hash or ""
        if HASH.fullmatch(known_hash):
            return known_hash
        return hashlib.sha256(f"{self.name} {self.num_bytes} {known_hash}".encode()).hexdigest()


class Wanted(NamedTuple):
    """A file to fetch, and where to put it."""

    file: HubFile
    target: Path


# (file, from, to or None for all of it) → a response
OpenSpan = Callable[[HubFile, tuple[int, int] | None], Any]


class _Task(NamedTuple):
    """A segment to fetch. A file's first one adds the tasks for its others: it shows whether the server has ranges."""

    part: _PartFile
    segment: int
    is_first: bool


class Transfer:
    """One download. `fetch` returns when all files are complete and their hashes are right."""

    def __init__(
        self,
        open_span: OpenSpan,
        stage: str,
        on_progress: OnProgress,
        *,
        retries: Retries = DEFAULT_RETRIES,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self._open_span = open_span
        self._stage = stage
        self._on_progress = on_progress
        self._retries = retries
        self._segment_bytes = segment_bytes
        self._lock = threading.Lock()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._num_open = 0
        self._is_over = threading.Event()
        self._done_bytes = 0
        self._total_bytes = 0
        self._reported_at = 0.0

    def fetch(self, wanted: Sequence[Wanted]) -> None:
        """Fetch all. Raises `ModelError` if a file cannot be fetched or its hash is wrong. Keeps unfinished files."""
        with ExitStack() as opened:
            parts = [opened.enter_context(closing(_PartFile(each, self._segment_bytes))) for each in wanted]
            self._total_bytes = sum(part.num_bytes for part in parts)
            self._done_bytes = sum(sum(part.counts) for part in parts)
            self._on_progress(self._sized_stage(), self._done_bytes / max(1, self._total_bytes))
            firsts = [_Task(part, pending[0], is_first=True) for part in parts if (pending := part.pending())]
            self._num_open = len(firsts)
            if firsts:
                for task in firsts:
                    self._tasks.put(task)
                try:
                    threads = [start_daemon(self._work, f"brlite-fetch-{number}") for number in range(NUM_THREADS)]
                    for ended in wait(threads, return_when=FIRST_EXCEPTION).done:
                        ended.result()
                finally:
                    self._end()  # an interrupt comes here too
            for part in parts:
                part.publish(self._on_progress)
            self._on_progress(self._sized_stage(), 1.0)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None and not self._is_over.is_set():
            more = self._fetch_segment(task)
            with self._lock:
                self._num_open += len(more) - 1
                is_last = self._num_open == 0
            for each in more:
                self._tasks.put(each)
            if is_last:
                self._end()

    def _end(self) -> None:
        """End the threads: at once, but for those that wait for the network."""
        self._is_over.set()
        for _ in range(NUM_THREADS):
            self._tasks.put(None)

    def _fetch_segment(self, task: _Task) -> list[_Task]:
        """Fetch a segment. A file's first one returns the tasks for its other segments."""
        part, segment, is_first = task
        failures = 0
        while not self._is_over.is_set():
            before = part.counts[segment]
            try:
                self._read(task)
                break
            except PassingFailure as failure:
                failures = 0 if part.counts[segment] > before else failures
                wait = wait_before(failures, failure, self._retries)
                if wait is None:
                    raise ModelUnreachable(
                        f"{part.file.name}: {failure}; the bytes received are kept for the next try"
                    ) from failure
                failures += 1
                self._is_over.wait(wait)
        others = [other for other in part.pending() if other != segment] if is_first else []
        return [_Task(part, other, is_first=False) for other in others]

    def _read(self, task: _Task) -> None:
        part, segment, is_first = task
        begin, end = part.span(segment)
        begin += part.counts[segment]
        if begin == end:
            return
        is_whole = begin == 0 and end == part.num_bytes
        with closing(self._open_span(part.file, None if is_whole else (begin, end))) as response:
            if is_whole or response.status == 206:
                position = begin
            elif is_first:
                position, end = 0, part.num_bytes  # the server has no range requests: it sends the whole file
            else:
                raise ModelError(f"{part.file.name}: the server has no range requests; the next try starts anew")
            name, num_bytes = part.file.name, part.num_bytes
            length, place = (response.headers.get(header) or "" for header in ("Content-Length", "Content-Range"))
            if response.status != 206 and length.isdecimal() and length != str(num_bytes):  # such as a page to log in
                raise ModelError(f"{name}: {one_line(length, 20)} bytes are sent, where the list has {num_bytes}")
            if response.status == 206 and place and not place.startswith(f"bytes {position}-"):
                raise ModelError(f"{name}: {excerpt(place)} is sent, not the bytes from {position} on")
            while position < end and not self._is_over.is_set():
                data = read_some(response, min(CHUNK_BYTES, end - position))
                if not data:
                    raise PassingFailure("the connection was cut")
                num_new = part.write(data, position)
                position += len(data)
                with self._lock:
                    self._done_bytes += num_new
                    if time.monotonic() >= self._reported_at + REPORT_SECONDS:
                        self._reported_at = time.monotonic()
                        fraction = min(1.0, self._done_bytes / max(1, self._total_bytes))
                        self._on_progress(self._sized_stage(), fraction)

    def _sized_stage(self) -> SizedStage:
        return SizedStage(self._stage, self._total_bytes)


class _PartFile:
    """An unfinished file, and in `counts` how many bytes of each segment it has."""

    def __init__(self, wanted: Wanted, segment_bytes: int) -> None:
        self.file, self._target = wanted
        self.num_bytes = self.file.num_bytes
        self._segment_bytes = segment_bytes
        num_segments = -(-self.num_bytes // segment_bytes)
        self._path = self._target.with_name(self._target.name + PART_SUFFIX)
        self._counts_path = self._path.with_name(self._path.name + COUNTS_SUFFIX)
        self._lock = threading.Lock()
        self._is_closed = False
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            handles = []
            for path in (self._path, self._counts_path):
                handles.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666))
                opened.callback(os.close, handles[-1])
            self._handle, self._counts_handle = handles
            # Resume what an earlier download left, if its counts are of this file in these segments; else begin anew.
            table = struct.Struct(f"<{2 + num_segments}Q")
            head = (self.num_bytes, segment_bytes)
            kept = os.pread(self._counts_handle, table.size + 1, 0)
            numbers = table.unpack(kept) if len(kept) == table.size else ()
            if numbers[:2] == head and os.fstat(self._handle).st_size == self.num_bytes:
                lengths = [end - begin for begin, end in map(self.span, range(num_segments))]
                self.counts = list(map(min, numbers[2:], lengths))
            else:
                self.counts = [0] * num_segments
                os.ftruncate(self._handle, 0)
                os.ftruncate(self._handle, self.num_bytes)
                os.ftruncate(self._counts_handle, 0)
                os.pwrite(self._counts_handle, table.pack(*head, *self.counts), 0)
            self._opened = opened.pop_all()

    def span(self, segment: int) -> tuple[int, int]:
        begin = segment * self._segment_bytes
        return begin, min(begin + self._segment_bytes, self.num_bytes)

    def pending(self) -> list[int]:
        """The numbers of the unfinished segments."""
        spans = map(self.span, range(len(self.counts)))
        return [number for number, (begin, end) in enumerate(spans) if self.counts[number] < end - begin]

    def write(self, data: bytes, position: int) -> int:
        """Write `data`, which may reach into further segments. Returns how many bytes are new."""
        new = 0
        with self._lock:
            while data and not self._is_closed:
                segment = position // self._segment_bytes
                begin, end = self.span(segment)
                piece, data = data[: end - position], data[end - position :]
                position += write_at(self._handle, piece, position)
                count = max(self.counts[segment], position - begin)
                new += count - self.counts[segment]
                self.counts[segment] = count
                number = count.to_bytes(NUMBER_BYTES, "little")
                os.pwrite(self._counts_handle, number, NUMBER_BYTES * (2 + segment))
        return new

    def publish(self, on_progress: OnProgress) -> None:
        """Check the hash and give the file its name. If the hash is wrong, raises `ModelError` and removes the file."""
        expected, digest = self.file.sha256, hashlib.sha256()
        if expected is None:
            expected, digest = self.file.git_hash, hashlib.sha1(b"blob %d\0" % self.num_bytes, usedforsecurity=False)
        position, stage = 0, SizedStage(f"checking {self.file.name}", self.num_bytes)
        while expected is not None and (data := os.pread(self._handle, CHUNK_BYTES, position)):
            digest.update(data)
            position += len(data)
            on_progress(stage, position / self.num_bytes)
        if expected is not None and digest.hexdigest() != expected.lower():
            self._path.unlink(missing_ok=True)
            self._counts_path.unlink(missing_ok=True)
            raise ModelError(
                f"{self.file.name} has {digest.name} {digest.hexdigest()}, but {expected} was expected; it was removed"
            )
        os.fsync(self._handle)
        self._path.replace(self._target)
        self._counts_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files. A thread that still waits for the network writes nothing afterwards."""
        with self._lock:
            self._is_closed = True
            self._opened.close()
