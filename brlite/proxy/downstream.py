"""The client's side of an exchange, which gets the response. `fast_path.py` and `middleware.py` have one each."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Protocol

from brlite.errors import RequestError

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: on, for no time


class Downstream(Protocol):
    """One client that waits for one response. A body in chunks is passed with its framing where `takes_chunks`.

    `request_id` is the id that the client is told, `peer` its IP address, if it has one.
    """

    takes_chunks: bool
    request_id: str
    peer: str | None

    def begin(self, status: int, lines: bytes, length: int | None) -> None:
        """Send the head of a response with a body of `length` bytes; None: in chunks, or until the connection ends."""

    def write(self, data: bytes) -> None:
        """Send a part of the body."""

    def answer(self, status: int, lines: bytes, body: bytes) -> None:
        """Send a complete response."""

    def refuse(self, error: RequestError) -> None:
        """Send an error as the complete response."""

    def cut(self) -> None:
        """End the connection: the response that has begun cannot be completed."""

    def ended(self) -> None:
        """The exchange has ended: everything has been sent, refused or cut."""


def reset(transport: asyncio.Transport) -> None:
    """Reset a connection, so that its client can tell a cut response from a complete one without a length."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family != getattr(socket, "AF_UNIX", None):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    transport.abort()
