"""Cuts a connection whose client has stopped reading. It watches the number of bytes that wait to be sent."""

from __future__ import annotations

import asyncio


class StallTimer:
    """Between `start` and `stop`, cuts the connection if the number of waiting bytes has not changed for `seconds`.

    An increase counts as progress too, since it may hide that the client has read. Writers that wait for the client add
    no bytes.
    """

    def __init__(self, transport: asyncio.Transport, seconds: float) -> None:
        self._transport = transport
        self._seconds = seconds
        self._num_waiting = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self.stop()
        self._num_waiting = self._transport.get_write_buffer_size()
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        if self._transport.get_write_buffer_size() == self._num_waiting:
            self._transport.abort()
        else:
            self.start()
