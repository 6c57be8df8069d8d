"""A server of completions that does what a script says, over an asyncio listener: raw bytes, good ones or garbage.

It reads requests strictly and notes whatever it should not have been sent. It counts, by request id, the jobs that were
begun, those that were done to the end, and those whose client left. It knows nothing of the proxy in front of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Literal, NamedTuple

import msgspec

When = Literal["accept", "head", "request"]
Then = Literal["keep", "close", "reset", "stall"]

REQUEST_LINE = re.compile(rb"(GET|POST|DELETE) (/[!-~]*) HTTP/1\.1")
HEADER = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+): ?([!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?")
NEVER_SENT = frozenset(
    b"connection keep-alive te trailer transfer-encoding upgrade expect x-api-key cookie proxy-authorization "
    b"proxy-connection authorization".split()
)


class Step(NamedTuple):
    """What is sent, once the request has come so far, and what becomes of the connection then.

    `piece` bytes are written at once (0: all), `pause` seconds apart. `is_work` says that the job is done to its end
    before anything is sent: the worst case for whoever would like to try again.
    """

    data: bytes
    then: Then = "keep"
    when: When = "request"
    piece: int = 0
    pause: float = 0.0
    is_work: bool = True


NOTHING = Step(b"")


class Request(NamedTuple):
    """What came: the path, the fields, and the JSON in the body (empty where none was waited for)."""

    path: bytes
    fields: dict[bytes, bytes]
    body: dict[str, object]
    method: bytes = b"POST"

    @property
    def is_stream(self) -> bool:
        return self.body.get("stream") is True

    @property
    def id(self) -> str:
        return self.fields.get(b"x-request-id", b"").decode()


Act = Callable[["Call"], Awaitable[Then]]


class ScriptedUpstream:
    """`async with ScriptedUpstream(plain=Step(…), stream=Step(…)) as upstream:` listens on `upstream.url`.

    `act`, where given, answers instead of the steps.
    """

    def __init__(self, plain: Step = NOTHING, stream: Step = NOTHING, act: Act | None = None) -> None:
        self.plain, self.stream = plain, stream
        self.act = act
        self.port = 0
        self.num_connections = 0
        self.num_busy = 0  # requests under way
        self.num_sent = 0  # bytes, for whoever counts them
        self.requests: list[Request] = []
        self.begun: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.faults: list[str] = []  # what it should not have been sent
        self.running = asyncio.Event()  # cleared: it neither reads nor writes, as a stopped process
        self.running.set()
        self._server: asyncio.Server | None = None
        self._calls: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def __aenter__(self) -> ScriptedUpstream:
        await self.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def num_open(self) -> int:
        """How many connections are open."""
        return len(self._calls)

    async def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, limit=2**24)
        self.port = self._server.sockets[0].getsockname()[1]

    async def kill(self) -> None:
        """Be gone at once, as a killed process: the port refuses, every connection is reset."""
        if self._server is not None:
            self._server.close()
            self._server = None
        calls = dict(self._calls)
        for task, writer in calls.items():
            reset(writer)
            task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._calls[task] = writer
        then: Then = "keep"
        try:
            while then == "keep":
                then = await Call(self, reader, writer).run()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client left
        except asyncio.CancelledError:
            then = "reset"  # killed
        finally:
            del self._calls[task]
            if then == "reset":
                reset(writer)
            writer.close()


class Call:
    """One request to a scripted upstream."""

    def __init__(self, upstream: ScriptedUpstream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.upstream = upstream
        self._reader, self._writer = reader, writer
        self.request = Request(b"", {}, {})

    async def run(self) -> Then:
        """Read the request and do as the script says."""
        upstream = self.upstream
        if upstream.plain.when == "accept":
            return await self._do(upstream.plain)
        await self._read_head()
        if upstream.plain.when == "head":
            return await self._do(upstream.plain)
        await self._read_body()
        upstream.begun[self.request.id] += 1
        upstream.num_busy += 1
        try:
            if upstream.act is not None:
                return await upstream.act(self)
            return await self._do(upstream.stream if self.request.is_stream else upstream.plain)
        except ConnectionError:
            upstream.left[self.request.id] += 1
            raise
        finally:
            upstream.num_busy -= 1

    def is_done(self) -> None:
        """The job has been done to its end."""
        self.upstream.done[self.request.id] += 1

    async def send(self, data: bytes) -> None:
        await self.upstream.running.wait()
        if self._writer.is_closing():
            raise ConnectionResetError
        self._writer.write(data)
        await self._writer.drain()

    async def wait_left(self, *, is_fault: bool = True) -> None:
        """Wait until the client has gone. Raises `ConnectionError`, always. What it still sends is a fault of its."""
        while data := await self._reader.read(2**16):
            if is_fault:
                self.upstream.faults.append(f"sent while a request is under way: {data[:100]!r}")
        raise ConnectionResetError

    async def _do(self, step: Step) -> Then:
        if step.is_work and step.when == "request":
            self.is_done()
        size = step.piece or len(step.data) or 1
        for at in range(0, len(step.data), size):
            await self.send(step.data[at : at + size])
            if step.pause:
                await asyncio.sleep(step.pause)
        if step.then == "stall":
            await self.wait_left(is_fault=step.when == "request")
        return step.then

    async def _read_head(self) -> None:
        head = await self._reader.readuntil(b"\r\n\r\n")
        await self.upstream.running.wait()
        line, *lines = head[:-4].split(b"\r\n")
        match = REQUEST_LINE.fullmatch(line)
        self._check(match is not None, f"request line {line[:200]!r}")
        fields: dict[bytes, bytes] = {}
        for line in lines:
            header = HEADER.fullmatch(line)
            self._check(header is not None, f"header {line[:200]!r}")
            name, value = line.split(b":")[0].lower(), line.partition(b":")[2].strip()
            self._check(name not in NEVER_SENT, f"header {line[:200]!r}")
            self._check(name not in fields, f"twice {line[:200]!r}")
            fields[name] = value
        self._check(fields.get(b"host") == f"127.0.0.1:{self.upstream.port}".encode(), f"host {fields.get(b'host')!r}")
        method = match[1] if match else b"POST"
        self._check(
            fields.get(b"content-length", b"").isdigit() is (method == b"POST"), f"Content-Length of a {method!r}"
        )
        self.request = Request(match[2] if match else b"", fields, {}, method)

    async def _read_body(self) -> None:
        body = await self._reader.readexactly(int(self.request.fields.get(b"content-length", b"0")))
        is_about_stored = self.request.method != b"POST" or self.request.path.endswith(b"/cancel")
        try:
            if not is_about_stored:
                self.request = self.request._replace(body=msgspec.json.decode(body, type=dict))
        except msgspec.DecodeError:
            self._check(False, f"body {body[:200]!r}")
        self.upstream.requests.append(self.request)

    def _check(self, is_good: bool, text: str) -> None:
        if not is_good:
            self.upstream.faults.append(text)


def reset(writer: asyncio.StreamWriter) -> None:
    """Cut the connection with a reset, where it has a socket."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
