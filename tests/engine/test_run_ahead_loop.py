"""An engine's loop over a backend that is given a step before the result of the one before is read."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from brlite.config.options import EngineConfig, LimitsConfig
from brlite.engine.async_engine import EngineLoop
from brlite.engine.backend import Batch, ScheduledSeq, StepResult
from brlite.engine.engine import Engine
from brlite.errors import BackendLost, EngineError, NotReady
from brlite.sampling_params import SamplingParams, StructuredOutput
from tests.fakes import ByteTokenizer, FakeBackend, reference_tokens

LONG = SamplingParams(temperature=0, max_tokens=30)


@asynccontextmanager
async def serving(backend: FakeBackend) -> AsyncIterator[EngineLoop]:
    engine = Engine(backend.info, ByteTokenizer(), EngineConfig(), LimitsConfig())  # type: ignore[arg-type]
    async with EngineLoop(engine, backend) as loop:
        yield loop


async def tokens_of(engine: EngineLoop, prompt: str, params: SamplingParams = LONG) -> list[int]:
    return [token async for output in engine.generate(prompt, params) for token in output.outputs[0].token_ids]


async def test_a_step_is_launched_before_the_result_of_the_one_before_is_read():
    backend = FakeBackend(can_run_ahead=True, max_model_len=128)

    async with serving(backend) as engine:
        answers = await asyncio.gather(*(tokens_of(engine, prompt) for prompt in ("one", "two", "three")))

    assert answers == [reference_tokens(prompt.encode(), 30) for prompt in ("one", "two", "three")]
    assert backend.num_launched_ahead >= len(backend.batches) - 2  # each but the first of a stream


async def test_a_backend_that_does_not_allow_it_executes_one_step_after_the_other():
    backend = FakeBackend(max_model_len=128)

    async with serving(backend) as engine:
        await tokens_of(engine, "hello")

    assert backend.num_launched_ahead == engine.stats.steps_ahead == 0
    assert len(backend.batches) == 30


async def test_an_answer_of_a_structure_waits_for_its_masks_and_is_right():
    backend = FakeBackend(can_run_ahead=True, max_model_len=128)
    wish = SamplingParams(structured=StructuredOutput(choice=["yes, indeed", "no, not at all"]), max_tokens=20)

    async with serving(backend) as engine:
        bound, free = await asyncio.gather(tokens_of(engine, "x", wish), tokens_of(engine, "hello"))

    assert bytes(bound) in (b"yes, indeed", b"no, not at all")
    assert free == reference_tokens(b"hello", 30)


@pytest.mark.parametrize("part", ["launch", "result"])
async def test_a_step_that_fails_in_either_part_ends_its_request_and_the_engine_serves_on(part: str):
    class Failing(FakeBackend):
        def launch(self, batch: Batch) -> Callable[[], StepResult]:
            if part == "launch" and batch.seqs[0].start == 3:
                raise RuntimeError("the queue of the device is full")
            return super().launch(batch)

    def fault(seq: ScheduledSeq) -> None:
        if part == "result" and seq.start == 3:
            raise RuntimeError("broken kernel")

    backend = Failing(can_run_ahead=True, fault=fault, max_model_len=128)
    async with serving(backend) as engine:
        with pytest.raises(EngineError, match="the model step failed"):
            await tokens_of(engine, "bad")
        tokens = await tokens_of(engine, "hello")
        await engine.wait_idle()

        assert engine.stats.step_failures == 1
        assert engine.stats.num_used_blocks == 0
    assert tokens == reference_tokens(b"hello", 30)


async def test_where_the_engine_fails_between_two_steps_the_one_under_way_is_fetched_and_dropped():
    class Liar(FakeBackend):
        def execute(self, batch: Batch) -> StepResult:
            result = super().execute(batch)
            return StepResult([]) if len(self.batches) == 2 else result

    backend = Liar(can_run_ahead=True, max_model_len=128)
    async with serving(backend) as engine:
        with pytest.raises(EngineError, match="the engine failed"):
            await tokens_of(engine, "bad")
        tokens = await tokens_of(engine, "hello")

    assert tokens == reference_tokens(b"hello", 30)


async def test_leaving_a_stream_ends_it_with_two_steps_under_way():
    backend = FakeBackend(can_run_ahead=True, max_model_len=128)

    async with serving(backend) as engine:
        stream = engine.generate("hello", LONG)
        await anext(stream)
        await stream.aclose()
        await engine.wait_idle()

        assert engine.stats.finished["abort"] == 1
        assert engine.stats.num_used_blocks == 0
        assert len(backend.batches) < 30


async def test_closing_ends_streams_with_two_steps_under_way_and_leaves_no_task_and_no_thread():
    tasks_before, threads_before = asyncio.all_tasks(), set(threading.enumerate())
    backend = FakeBackend(can_run_ahead=True, max_model_len=128)
    backend.gate = threading.Event()

    async with serving(backend) as engine:
        reader = asyncio.create_task(tokens_of(engine, "hello"))
        await asyncio.to_thread(backend.has_begun.wait, 60)
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        backend.gate.set()
        await closing
        with pytest.raises(NotReady):
            await reader

    assert backend.is_closed
    assert len(backend.batches) == 1  # the step that was launched behind it was never fetched
    assert asyncio.all_tasks() == tasks_before
    assert {thread for thread in set(threading.enumerate()) - threads_before if "brlite" in thread.name} == set()


async def test_a_backend_that_is_lost_with_two_steps_under_way_ends_all_requests():
    class Losing(FakeBackend):
        def execute(self, batch: Any) -> StepResult:
            if len(self.batches) == 3:
                raise BackendLost("the card fell off the bus")
            return super().execute(batch)

    async with serving(Losing(can_run_ahead=True, max_model_len=128)) as engine:
        with pytest.raises(EngineError, match="a process or device that computes the model is gone"):
            await tokens_of(engine, "hello")

        assert not engine.is_running
        assert engine.stats.num_used_blocks == 0
