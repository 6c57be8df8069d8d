"""Cuts a connection whose client has stopped reading. Knows no requests: it watches the bytes that wait to be sent."""

from __future__ import annotations

import asyncio


class StallTimer:
    """From `start` to `stop`, cut the connection once nothing has moved for `seconds`.

    More bytes waiting than before count as movement too: they hide what the client took meanwhile, and writers that
    wait for it add no more.
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
