"""A coroutine with a time limit ends in time, with its own result or error, and loses no cancellation."""

from __future__ import annotations

import asyncio

import pytest

from brlite.process.waiting import within
from tests.limits import PATIENCE_SECONDS


async def test_a_cancellation_that_comes_with_the_answer_is_not_lost() -> None:
    has_come = asyncio.Event()
    waiting = asyncio.create_task(within(PATIENCE_SECONDS, has_come.wait()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)

    has_come.set()
    await asyncio.sleep(0)  # the answer is there, and nobody has taken it yet
    waiting.cancel()

    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_what_takes_too_long_is_cancelled_and_has_ended_then() -> None:
    ended = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("work")

    with pytest.raises(asyncio.TimeoutError):
        await within(0.01, work())

    assert ended == ["work"]


async def test_without_a_limit_the_result_is_waited_for() -> None:
    assert await within(None, asyncio.sleep(0, "result")) == "result"
