"""An event loop whose time jumps to whatever is due next, and whose connections are pairs of buffers in memory.

All that is random comes from one seed: how long bytes travel and in which pieces they arrive. So a run of hours takes
milliseconds and can be repeated. Connections behave as asyncio's do over TCP, with small buffers; there is no TLS.
"""

from __future__ import annotations

import asyncio
import random
import selectors
import socket
from collections.abc import Callable
from typing import Any

BUFFER_BYTES = 4096  # what is on its way to a reader that does not read
MAX_LATENCY_SECONDS = 0.02
DIALING_SECONDS = 130.0  # how long a kernel tries
END_OF_TIME_SECONDS = 10_000.0
CLOCK_RESOLUTION_SECONDS = 1e-9


class Stuck(AssertionError):
    """Nothing is due, ever: what is waited for cannot happen."""


class _Selector(selectors.SelectSelector):
    """Selects nothing; instead of waiting it moves the clock."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None or self.loop.now > END_OF_TIME_SECONDS:
            raise Stuck("what is waited for will never happen")
        self.loop.now += max(timeout, CLOCK_RESOLUTION_SECONDS) if timeout else 0.0
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`ends` are the open ends of its connections. A port in `deaf` takes no connection, and refuses none."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self.ends: set[End] = set()
        self.deaf: set[int] = set()
        self._listeners: dict[int, Listener] = {}
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def latency(self) -> float:
        return self.random.random() * MAX_LATENCY_SECONDS if self.random.random() < 0.5 else 0.0

    async def create_server(self, factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        number = port or 1024 + len(self._listeners)
        while not port and number in self._listeners:
            number += 1
        if port in self._listeners:
            raise OSError("the port is taken")
        listener = self._listeners[number] = Listener(self._listeners, factory, number)
        return listener

    async def create_connection(self, factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        await asyncio.sleep(self.latency())
        if port in self.deaf:
            await asyncio.sleep(DIALING_SECONDS)
            raise TimeoutError(f"port {port} says nothing")
        listener = self._listeners.get(port)
        if listener is None:
            raise ConnectionRefusedError(f"port {port} refuses")
        near, far = End(self, factory(), port), End(self, listener.factory(), port)
        near.peer, far.peer = far, near
        self.call_soon(far.protocol.connection_made, far)
        near.protocol.connection_made(near)
        return near, near.protocol


class Listener:
    """What `create_server` gives."""

    def __init__(self, listeners: dict[int, Listener], factory: Callable[[], asyncio.Protocol], port: int) -> None:
        self._listeners, self.factory = listeners, factory
        self.sockets = [_Socket(port)]

    def close(self) -> None:
        self._listeners.pop(self.sockets[0].port, None)


class _Socket:
    family = socket.AF_INET
    is_lingering = False

    def __init__(self, port: int) -> None:
        self.port = port

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def setsockopt(self, level: int, option: int, value: object) -> None:
        self.is_lingering |= option == socket.SO_LINGER

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        return b""  # as a kernel that does not know it


class End(asyncio.Transport):
    """One end of a connection. What is written waits here, then with the peer, until its protocol has taken it."""

    peer: End

    def __init__(self, loop: VirtualLoop, protocol: asyncio.Protocol, port: int) -> None:
        super().__init__()
        self._loop, self.protocol, self._socket = loop, protocol, _Socket(port)
        self._outgoing = bytearray()
        self._incoming = bytearray()
        self._high, self._low = 65536, 16384
        self._is_closing = self._is_lost = self._is_deaf = self._is_full = False
        self._wants_eof = self._sent_eof = self._got_eof = self._is_delivering = False
        loop.ends.add(self)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        known = {"socket": self._socket, "peername": ("127.0.0.1", 1), "sockname": self._socket.getsockname()}
        return known.get(name, default)

    def get_protocol(self) -> Any:
        return self.protocol

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def is_closing(self) -> bool:
        return self._is_closing

    # Writing

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = 65536 if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        return len(self._outgoing)

    def write(self, data: Any) -> None:
        if self._is_lost or self._wants_eof:
            return
        assert not self._is_closing, "a write after close"
        self._outgoing += data
        self._move()
        if len(self._outgoing) > self._high and not self._is_full:
            self._is_full = True
            self.protocol.pause_writing()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self._wants_eof = True
        self._move()

    def _move(self) -> None:
        """To the peer goes what it has room for. One that is gone answers with a reset."""
        if self.peer._is_lost and self._outgoing:
            self._loop.call_later(self._loop.latency(), self._reset)
            return
        room = BUFFER_BYTES - len(self.peer._incoming)
        if room > 0 and self._outgoing:
            self.peer._incoming += self._outgoing[:room]
            del self._outgoing[:room]
        if self._is_full and len(self._outgoing) <= self._low:
            self._is_full = False
            self._loop.call_soon(self._resume_writing)
        if self._wants_eof and not self._outgoing and not self._sent_eof:
            self._sent_eof = self.peer._got_eof = True
            if self._is_closing:
                self._loop.call_soon(self._lose, None)
        self.peer._deliver_soon()

    def _resume_writing(self) -> None:
        if not self._is_lost:
            self.protocol.resume_writing()

    # Reading

    def is_reading(self) -> bool:
        return not self._is_deaf

    def pause_reading(self) -> None:
        self._is_deaf = True

    def resume_reading(self) -> None:
        self._is_deaf = False
        self._deliver_soon()

    def _deliver_soon(self) -> None:
        if not self._is_delivering and (self._incoming or self._got_eof):
            self._is_delivering = True
            self._loop.call_later(self._loop.latency(), self._deliver)

    def _deliver(self) -> None:
        self._is_delivering = False
        if self._is_lost or self._is_closing or self._is_deaf:
            return
        if self._incoming:
            size = self._loop.random.choice((1, 20, 300, BUFFER_BYTES))
            data = bytes(self._incoming[:size])
            del self._incoming[:size]
            self.protocol.data_received(data)
            self.peer._move()
            self._deliver_soon()
        elif self._got_eof:
            self._got_eof = False
            if not self.protocol.eof_received():
                self.close()

    # Ends

    def close(self) -> None:
        if self._is_closing:
            return
        self._is_closing = True
        if self._wants_eof and self._sent_eof:
            self._loop.call_soon(self._lose, None)
        else:
            self.write_eof()

    def abort(self) -> None:
        if self._is_lost:
            return
        self._is_closing = True
        self._outgoing.clear()
        self._loop.call_soon(self._lose, None)

    def _lose(self, error: Exception | None) -> None:
        if self._is_lost:
            return
        self._is_lost = self._is_closing = True
        self._loop.ends.discard(self)
        self.protocol.connection_lost(error)
        if not self.peer._is_lost:
            # As a kernel does it: what was not read, and SO_LINGER, make it a reset, which overtakes what was sent.
            if self._incoming or self._socket.is_lingering:
                self._loop.call_later(self._loop.latency(), self.peer._reset)
            else:
                self.peer._got_eof = True
                self.peer._deliver_soon()

    def _reset(self) -> None:
        self._incoming.clear()
        self._outgoing.clear()
        self._lose(ConnectionResetError("the peer has reset the connection"))
