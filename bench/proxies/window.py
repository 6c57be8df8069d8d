"""One load on one proxy, by the load client (`http_load.cpp`), and what the proxy's processes used meanwhile.

Also what idle connections cost. Starts no servers and compares nothing.
"""

from __future__ import annotations

import http.client
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import msgspec
from measuring.memory import tree_memory
from measuring.process_tree import Times, process_tree, processor_times
from msgspec import Struct
from peers.servers import HOST
from proxies.works import Work

PATH = "/v1/chat/completions"
CALM_REQUESTS = 50
ANSWER_SECONDS = 30.0


class LoadFailed(Exception):
    """The load client or a server did not do what was asked of it."""


class Findings(Struct, frozen=True, kw_only=True):
    """What the load client prints: counts and times of the window, errors of the whole run.

    `altered` answers and events mean the same as the backend's but are not its bytes.
    """

    seconds: float
    requests: int
    events: int
    reads: int
    latency_p50_us: float
    latency_p99_us: float
    gap_p50_us: float
    gap_p99_us: float
    errors: int
    altered: int
    reconnects: int
    first_error: str


class Used(Struct, frozen=True, kw_only=True):
    """What a process tree used in the window, and the bytes of memory that it had at its end."""

    times: Times
    memory: int


def run_work(program: Path, work: Work, port: int, pid: int, folder: Path) -> tuple[Findings, Used]:
    """Put the work on the port and watch the process tree of `pid`, which is behind it."""
    body = folder / f"{work.name}.json"
    body.write_bytes(work.body)
    numbers = [port, body, work.events, work.connections, work.warm_up_seconds, work.seconds]
    command = [str(program), *map(str, numbers)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        tree = process_tree(pid)
        _expect(client.stdout, b"measuring")
        before = processor_times(tree)
        _expect(client.stdout, b"measured")
        times = processor_times(tree).since(before)
        memory = tree_memory(pid)
        found = client.stdout.read()
    if client.returncode != 0 or memory is None:
        raise LoadFailed(f"{work.name}: the load client or the server has ended")
    return msgspec.json.decode(found, type=Findings), Used(times=times, memory=memory.resident)


def _expect(lines: IO[bytes], word: bytes) -> None:
    if lines.readline().strip() != word:
        raise LoadFailed("the load client has ended")


def idle_connection_bytes(body: bytes, port: int, pid: int, count: int) -> float:
    """What each of `count` connections takes that have had one answer and wait, in a server that was just started."""
    calm = _Caller(port)
    for _ in range(CALM_REQUESTS):  # what the first requests allocate belongs to no connection
        calm.ask(body)
    before = tree_memory(pid)
    callers = [_Caller(port) for _ in range(count)]
    for caller in callers:
        caller.ask(body)
    after = tree_memory(pid)
    _ask_again(callers, body)
    if before is None or after is None:
        raise LoadFailed("the server has ended")
    return (after.resident - before.resident) / count


class _Caller:
    """A connection that is kept."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection(HOST, port, timeout=ANSWER_SECONDS)

    def ask(self, body: bytes) -> None:
        try:
            self._connection.request("POST", PATH, body, {"Content-Type": "application/json"})
            response = self._connection.getresponse()
            response.read()
        except (http.client.HTTPException, OSError) as error:
            raise LoadFailed(f"a request on a kept connection failed: {error!r}") from None
        if response.status != 200 or self._connection.sock is None:
            raise LoadFailed(f"status {response.status}, or the connection was not kept")

    def close(self) -> None:
        self._connection.close()


def _ask_again(callers: Sequence[_Caller], body: bytes) -> None:
    """They were kept only if they still answer."""
    for caller in callers:
        caller.ask(body)
        caller.close()
