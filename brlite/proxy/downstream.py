"""What an answer is given to: the client's side of an exchange. `fast_path.py` and `middleware.py` have one each."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Protocol

from brlite.errors import RequestError

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time


class Downstream(Protocol):
    """One client that waits for one answer. Chunked bodies come framed, but only where `takes_chunks`."""

    takes_chunks: bool

    def begin(self, status: int, lines: bytes, length: int | None) -> None:
        """Send the head of an answer whose body has `length` bytes; None is as chunks, or until the connection ends."""

    def write(self, data: bytes) -> None:
        """Send a part of the body."""

    def answer(self, status: int, lines: bytes, body: bytes) -> None:
        """Send a whole answer."""

    def refuse(self, error: RequestError) -> None:
        """Send an error as the whole answer."""

    def cut(self) -> None:
        """End the connection: what was begun cannot be brought to its end."""

    def ended(self) -> None:
        """Nothing more comes: all has been sent, refused or cut."""


def reset(transport: asyncio.Transport) -> None:
    """Cut a connection so that its client can tell that from an answer's end, even if it was told no length."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family != getattr(socket, "AF_UNIX", None):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()
