"""When a client that reads slowly is taken for one that has stopped."""

from __future__ import annotations

import asyncio

import pytest

from brlite.http.stall import StallTimer
from tests.limits import PATIENCE_SECONDS


class Transport(asyncio.Transport):
    """Has as many bytes waiting as `sizes` says, one after the other and then for ever the last."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes
        self.is_cut = asyncio.Event()

    def get_write_buffer_size(self) -> int:
        return self.sizes.pop(0) if len(self.sizes) > 1 else self.sizes[0]

    def abort(self) -> None:
        self.is_cut.set()


@pytest.mark.parametrize(
    "sizes", [[5], [9, 8, 8, 7, 7], [9, 12, 12, 10, 10]], ids=["none", "reads", "reads and gets more"]
)
async def test_a_client_is_cut_off_only_when_nothing_moves(sizes: list[int]) -> None:
    transport = Transport(sizes)

    StallTimer(transport, 0.001).start()
    await asyncio.wait_for(transport.is_cut.wait(), PATIENCE_SECONDS)

    assert len(sizes) == 1


async def test_a_stopped_timer_cuts_nobody() -> None:
    transport = Transport([5])
    timer = StallTimer(transport, 0.001)

    timer.start()
    timer.stop()
    await asyncio.sleep(0.01)

    assert not transport.is_cut.is_set()
