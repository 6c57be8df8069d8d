"""A backend whose processes are gone: in a step, between two, before the first request."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from brlite.config.options import EngineConfig, LimitsConfig
from brlite.engine.async_engine import LOST, EngineLoop
from brlite.engine.backend import Batch, CanBeLost, StepResult
from brlite.engine.engine import Engine
from brlite.errors import BackendLost, EngineError, NotReady
from brlite.sampling_params import SamplingParams
from tests.fakes import ByteTokenizer, FakeBackend

GREEDY = SamplingParams(temperature=0, max_tokens=8)


class MortalBackend(FakeBackend):
    """`die` is what happens when a process dies: whoever watches is told, and no step is computed from then on."""

    def __init__(self, max_draft_tokens: int = 0) -> None:
        super().__init__(max_num_seqs=2, max_draft_tokens=max_draft_tokens)
        self.lost: BackendLost | None = None
        self._tell: Callable[[BackendLost], None] = lambda error: None

    def watch(self, on_lost: Callable[[BackendLost], None]) -> None:
        self._tell = on_lost

    def die(self) -> None:
        self.lost = BackendLost("rank 1 died of signal 9")
        self._tell(self.lost)

    def execute(self, batch: Batch) -> StepResult:
        result = super().execute(batch)
        if self.lost is not None:
            raise self.lost
        return result


@asynccontextmanager
async def running(draft: FakeBackend | None = None) -> AsyncIterator[tuple[EngineLoop, MortalBackend, list[str]]]:
    backend, losses = MortalBackend(0 if draft is None else 4), list[str]()
    inner = Engine(backend.info, ByteTokenizer(), EngineConfig(), LimitsConfig(), draft_backend=draft)
    engine = EngineLoop(inner, backend)
    engine.watch(lambda: losses.append("lost"))
    async with engine:
        yield engine, backend, losses


async def fate(engine: EngineLoop, prompt: str) -> str:
    """How a request ends."""
    try:
        async for output in engine.generate(prompt, GREEDY):
            if output.finished:
                return "finished"
    except EngineError as error:
        return str(error)
    raise AssertionError("a stream without an end")


def test_the_fake_is_one_that_can_be_lost_and_others_are_not() -> None:
    assert isinstance(MortalBackend(), CanBeLost)
    assert not isinstance(FakeBackend(), CanBeLost)


async def test_a_loss_in_a_step_ends_all_requests_those_that_wait_too(
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    async with running() as (engine, backend, losses):
        backend.gate = threading.Event()
        requests = [asyncio.create_task(fate(engine, f"prompt {number}")) for number in range(5)]
        await eventually(lambda: engine.stats.num_running == 2)
        backend.die()
        backend.gate.set()
        fates = await asyncio.gather(*requests)

        assert fates == [LOST] * 5
        assert losses == ["lost"]
        assert not engine.is_running


async def test_a_loss_between_two_steps_is_noticed_without_a_request(
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    async with running() as (engine, backend, losses):
        assert await fate(engine, "before") == "finished"
        died = threading.Thread(target=backend.die)
        died.start()
        await eventually(lambda: not engine.is_running)
        died.join()

        assert losses == ["lost"]
        with pytest.raises(NotReady):
            await fate(engine, "after")


async def test_a_loss_while_the_draft_model_computes_is_noticed_although_its_request_is_aborted(
    eventually: Callable[[Callable[[], bool]], None],
) -> None:
    draft = FakeBackend()
    draft.gate = threading.Event()
    async with running(draft) as (engine, backend, losses):
        reader = asyncio.create_task(fate(engine, "hello"))
        await eventually(draft.has_begun.is_set)
        reader.cancel()
        backend.die()
        await asyncio.wait([reader])
        draft.gate.set()
        await eventually(lambda: not engine.is_running)

        assert losses == ["lost"]


async def test_a_loss_that_is_told_after_the_end_disturbs_nobody() -> None:
    async with running() as (engine, backend, losses):
        await fate(engine, "before")

    backend.die()

    assert losses == []
