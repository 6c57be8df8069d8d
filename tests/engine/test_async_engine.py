"""The engine in an event loop: streams, slow readers, aborts, faults and a clean close."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

from brlite.config.options import EngineConfig, LimitsConfig
from brlite.engine.async_engine import EngineLoop
from brlite.engine.backend import ScheduledSeq
from brlite.engine.engine import Engine
from brlite.engine.fair_thread import FairThread
from brlite.engine.outputs import RequestOutput
from brlite.engine.request import Sequence
from brlite.errors import EngineError, InvalidRequest, NotReady, stopping
from brlite.process.waiting import start_daemon
from brlite.sampling_params import PoolingParams, SamplingParams, StructuredOutput
from brlite.tokenizer.infill import InfillText
from brlite.tokenizer.tokenizer import LONG_TEXT
from tests.fakes import ByteTokenizer, FakeBackend, hidden_state, reference_tokens
from tests.limits import PATIENCE_SECONDS

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@asynccontextmanager
async def running(**kw: Any) -> AsyncIterator[tuple[EngineLoop, FakeBackend]]:
    backend = FakeBackend(**kw)
    engine = Engine(backend.info, ByteTokenizer(), EngineConfig(), LimitsConfig())
    async with EngineLoop(engine, backend) as async_engine:
        yield async_engine, backend


async def collect(engine: EngineLoop, prompt: str, params: SamplingParams = GREEDY) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, params)]


async def test_many_requests_at_once_each_get_their_own_text() -> None:
    prompts = [f"prompt {number}" for number in range(20)]

    async with running() as (engine, _):
        answers = await asyncio.gather(*(collect(engine, prompt) for prompt in prompts))

    for prompt, outputs in zip(prompts, answers, strict=True):
        token_ids = [token for output in outputs for token in output.outputs[0].token_ids]
        assert token_ids == reference_tokens(prompt.encode(), 8)


@pytest.mark.parametrize("prompt", [[1.5], ["1"], [None], 5])
async def test_token_ids_that_are_no_integers_are_refused(prompt: Any) -> None:
    async with running() as (engine, _):
        with pytest.raises(InvalidRequest, match="integer token ids"):
            await collect(engine, prompt)


async def test_what_a_slow_reader_did_not_fetch_comes_merged() -> None:
    async with running() as (engine, _):
        stream = engine.generate("hello", GREEDY)
        first = await anext(stream)
        await engine.wait_idle()
        rest = [output async for output in stream]

    assert len(rest) == 1
    assert [*first.outputs[0].token_ids, *rest[0].outputs[0].token_ids] == reference_tokens(b"hello", 8)


async def test_cancelling_the_reader_aborts_the_request() -> None:
    async with running() as (engine, backend):
        backend.gate = threading.Event()
        task = asyncio.create_task(collect(engine, "hello", SamplingParams(max_tokens=30)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        backend.gate.set()
        await engine.wait_idle()

        assert engine.stats.num_used_blocks == 0
        assert len(backend.batches) <= 1


async def test_cancelling_who_waits_for_embeddings_aborts_all_of_them(
    eventually: Callable[[Callable[[], bool]], Awaitable[None]],
) -> None:
    async with running(max_num_seqs=2) as (engine, backend):
        backend.gate = threading.Event()
        task = asyncio.create_task(engine.embed(["hello", *map(str, range(20))]))
        await eventually(backend.has_begun.is_set)
        task.cancel()
        await asyncio.wait([task])
        backend.gate.set()
        await engine.wait_idle()

        assert engine.stats.finished == {"abort": 2 * 2}  # the others had not come to the engine yet
        assert engine.stats.num_used_blocks == 0
        assert len(backend.batches) == 1


async def test_embeddings_of_one_call_share_steps_and_one_that_fails_ends_all() -> None:
    def fault(seq: ScheduledSeq) -> str | None:
        return "broken" if seq.token_ids == list(b"13") else None

    prompts = [*map(str, range(10, 30))]
    async with running(max_num_seqs=4) as (engine, backend):
        outputs = await engine.embed(prompts, PoolingParams(normalize=False))
        num_steps = len(backend.batches)
    async with running(fault=fault) as (engine, _):
        with pytest.raises(EngineError, match="broken"):
            await engine.embed(prompts)
        await engine.wait_idle()

        assert engine.stats.finished["error"] == 1

    assert num_steps == 5
    assert [output.embedding for output in outputs] == [
        array("f", hidden_state(list(prompt.encode()))) for prompt in prompts
    ]


async def test_a_wrong_prompt_of_several_is_named_and_none_runs() -> None:
    async with running() as (engine, backend):
        cases: list[tuple[list[Any], list[str], str]] = [
            (["a", ""], [], "prompts[1]"),
            (["a" * 65], ["input"], "input"),
            ([[1, 300]], [], "prompts[0]"),
        ]
        for prompts, names, param in cases:
            with pytest.raises(InvalidRequest) as caught:
                await engine.embed(prompts, names=names)
            assert caught.value.param == param
            assert str(caught.value).startswith((f"{param}: ", "This model"))

        assert await engine.embed([]) == []
        assert not backend.batches


async def test_leaving_the_iterator_aborts_the_request() -> None:
    async with running() as (engine, backend):
        stream = engine.generate("hello", SamplingParams(temperature=0, max_tokens=30))
        await anext(stream)
        await stream.aclose()
        await engine.wait_idle()

        assert engine.stats.finished["abort"] == 1
        assert len(backend.batches) < 30


@pytest.mark.parametrize("error", [RuntimeError("broken kernel"), StopIteration()])
async def test_a_failed_step_raises_at_its_reader_and_the_engine_serves_on(error: Exception) -> None:
    def fault(seq: Any) -> None:
        if seq.token_ids[0] == ord("x"):
            raise error

    async with running(fault=fault) as (engine, _):
        with pytest.raises(EngineError):
            await collect(engine, "x")
        outputs = await collect(engine, "hello")

    assert outputs[-1].finished


async def test_a_wrong_request_raises_before_anything_runs() -> None:
    async with running() as (engine, backend):
        with pytest.raises(InvalidRequest):
            await collect(engine, "")

    assert backend.batches == []


async def test_a_backend_that_answers_nonsense_ends_its_requests_and_the_engine_goes_on() -> None:
    class Liar(FakeBackend):
        def execute(self, batch: Any) -> Any:
            result = super().execute(batch)
            return type(result)([]) if len(self.batches) == 1 else result

    backend = Liar()
    async with EngineLoop(Engine(backend.info, ByteTokenizer(), EngineConfig(), LimitsConfig()), backend) as engine:
        with pytest.raises(EngineError, match="the engine failed"):
            await collect(engine, "hello")
        outputs = await collect(engine, "hello")

    assert outputs[-1].finished
    assert engine.stats.engine_failures == 1


async def test_a_long_text_is_encoded_on_a_thread_that_ends_with_the_engine() -> None:
    threads_before = set(threading.enumerate())

    async with running(max_model_len=2 * LONG_TEXT, num_blocks=4 * LONG_TEXT) as (engine, _):
        token_ids = await engine.prompts.encode("x" * (LONG_TEXT + 1))
        (thread,) = {each for each in threading.enumerate() if each.name.startswith("brlite-encode")} - threads_before

    assert len(token_ids) == LONG_TEXT + 1
    await asyncio.to_thread(thread.join, PATIENCE_SECONDS)
    assert not thread.is_alive()


@pytest.mark.parametrize("is_infill", [False, True])
async def test_the_event_loop_does_not_wait_for_a_tokenizer_in_a_child_process(is_infill: bool) -> None:
    class InChild(ByteTokenizer):
        encodes_in_process = False
        threads: set[int] = set()  # noqa: RUF012

        def encode(self, text: str, **options: Any) -> list[int]:
            self.threads.add(threading.get_ident())
            return super().encode(text, **options)

        def encode_infill(self, text: InfillText, **options: Any) -> list[int]:
            return self.encode(text.before)

    backend, tokenizer = FakeBackend(), InChild()
    async with EngineLoop(Engine(backend.info, tokenizer, EngineConfig(), LimitsConfig()), backend) as engine:
        if is_infill:
            await engine.prompts.encode_infill(InfillText("short", ""))
        else:
            await engine.prompts.encode("short")

    assert tokenizer.threads
    assert threading.get_ident() not in tokenizer.threads


async def test_a_backend_that_cannot_close_leaves_no_thread() -> None:
    class Stuck(FakeBackend):
        def close(self) -> None:
            raise RuntimeError("the device is lost")

    threads_before = set(threading.enumerate())
    backend = Stuck()
    engine = EngineLoop(Engine(backend.info, ByteTokenizer(), EngineConfig(), LimitsConfig()), backend)
    await engine.start()
    await collect(engine, "hello")

    with pytest.raises(RuntimeError, match="the device is lost"):
        await engine.close()

    assert set(threading.enumerate()) <= threads_before


async def test_a_backend_that_cannot_close_keeps_no_other_from_closing() -> None:
    class Stuck(FakeBackend):
        def close(self) -> None:
            raise RuntimeError("the device is lost")

    backend, draft_backend = Stuck(max_draft_tokens=4), FakeBackend()
    engine = Engine(backend.info, ByteTokenizer(), EngineConfig(), LimitsConfig(), draft_backend=draft_backend)

    with pytest.raises(RuntimeError, match="the device is lost"):
        await EngineLoop(engine, backend).close()

    assert draft_backend.is_closed


def test_an_engine_whose_loop_is_closed_also_closes_its_tokenizer() -> None:
    class Closing(ByteTokenizer):
        is_closed = False

        def close(self) -> None:
            self.is_closed = True

    backend, tokenizer = FakeBackend(), Closing()
    engine = EngineLoop(Engine(backend.info, tokenizer, EngineConfig(), LimitsConfig()), backend)
    asyncio.run(engine.start())

    asyncio.run(engine.close())

    assert tokenizer.is_closed
    assert backend.is_closed


async def test_code_that_raises_stop_iteration_keeps_no_thread_from_its_next_work() -> None:
    def end() -> None:
        raise StopIteration

    thread = FairThread("test", stopping)
    for running in (thread.run("", end), asyncio.wrap_future(start_daemon(end, "test"))):
        with pytest.raises(RuntimeError, match="StopIteration"):
            await running

    assert await thread.run("", lambda: "next") == "next"
    thread.close()


async def test_a_closed_engine_encodes_no_long_text() -> None:
    async with running(max_model_len=2 * LONG_TEXT, num_blocks=4 * LONG_TEXT) as (engine, _):
        await engine.close()
        with pytest.raises(NotReady):
            await engine.prompts.encode("x" * (LONG_TEXT + 1))


async def test_a_text_that_is_encoded_while_the_engine_closes_is_no_bad_request() -> None:
    class Dying(ByteTokenizer):
        """Fails as one does whose child process is ended: when it is closed."""

        has_begun, is_closed = threading.Event(), threading.Event()

        def encode(self, text: str, **options: Any) -> list[int]:
            self.has_begun.set()
            self.is_closed.wait(60)
            raise InvalidRequest("its process was ended")

        def close(self) -> None:
            self.is_closed.set()

    backend, tokenizer = FakeBackend(max_model_len=2 * LONG_TEXT, num_blocks=4 * LONG_TEXT), Dying()
    async with EngineLoop(Engine(backend.info, tokenizer, EngineConfig(), LimitsConfig()), backend) as engine:
        encoding = asyncio.create_task(engine.prompts.encode("x" * (LONG_TEXT + 1)))
        await asyncio.to_thread(tokenizer.has_begun.wait, 60)

    with pytest.raises(NotReady):
        await encoding


async def test_each_request_that_a_close_ends_has_an_error_of_its_own() -> None:
    async with running() as (engine, backend):
        backend.gate = threading.Event()
        readers = [asyncio.create_task(collect(engine, prompt)) for prompt in ("a", "b")]
        await asyncio.to_thread(backend.has_begun.wait, 10)
        backend.gate.set()
    first, second = await asyncio.gather(*readers, return_exceptions=True)

    assert isinstance(first, NotReady)
    assert isinstance(second, NotReady)
    assert first is not second


async def test_a_cancelled_close_still_closes() -> None:
    async with running() as (engine, backend):
        backend.gate = threading.Event()
        stream = engine.generate("hello", GREEDY)
        reader = asyncio.create_task(anext(stream))  # type: ignore[arg-type]  # it is a coroutine
        await asyncio.to_thread(backend.has_begun.wait, 10)
        closing = asyncio.create_task(engine.close())
        await asyncio.sleep(0)
        closing.cancel()
        backend.gate.set()
        await engine.close()

    with pytest.raises(NotReady):
        await reader
    assert backend.is_closed


@pytest.mark.parametrize("num_turns", range(2, 6))
async def test_a_close_that_the_end_of_asyncio_run_cancels_still_closes(
    num_turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()

    class Thread(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, **options: Any) -> None:
            gate.set()  # only now the step under way ends
            super().shutdown(wait, **options)

    backend = FakeBackend()
    backend.gate = gate
    engine = EngineLoop(Engine(backend.info, ByteTokenizer(), EngineConfig(), LimitsConfig()), backend)
    monkeypatch.setattr(engine, "_thread", Thread(1))
    await engine.start()
    reader = asyncio.create_task(collect(engine, "hello"))
    await asyncio.to_thread(backend.has_begun.wait, 10)
    closing = asyncio.create_task(engine.close())
    for _ in range(num_turns):
        await asyncio.sleep(0)
    for task in asyncio.all_tasks():
        if task.get_name() == "brlite-close":
            task.cancel()
    done, _ = await asyncio.wait([closing, reader], timeout=10)
    gate.set()

    assert backend.is_closed
    assert done == {closing, reader}
    with pytest.raises(NotReady):
        reader.result()


async def test_closing_ends_open_streams_and_leaves_no_task_and_no_thread() -> None:
    tasks_before, threads_before = asyncio.all_tasks(), set(threading.enumerate())
    async with running() as (engine, backend):
        stream = engine.generate("hello", SamplingParams(temperature=0, max_tokens=30))
        await anext(stream)
        await engine.close()
        with pytest.raises(NotReady):
            [output async for output in stream]

    assert backend.is_closed
    assert asyncio.all_tasks() == tasks_before
    assert set(threading.enumerate()) <= threads_before


def live_sequences() -> list[Sequence]:
    return [each for each in gc.get_objects() if type(each) is Sequence]


async def test_a_closed_engine_and_its_requests_are_freed_without_the_garbage_collector() -> None:
    gc.collect()
    gc.disable()
    others = live_sequences()  # of other tests
    try:
        backend = FakeBackend()
        engine = EngineLoop(Engine(backend.info, ByteTokenizer(), EngineConfig(), LimitsConfig()), backend)
        freed = [weakref.ref(engine), weakref.ref(engine._engine), weakref.ref(engine.tokenizer)]
        engine.watch(partial(str, engine))
        async with engine:
            for params in (GREEDY, SamplingParams(n=3), SamplingParams(temperature=0, use_beam_search=True, best_of=3)):
                await collect(engine, "hello", params)
            async for _ in engine.generate("one that is left", SamplingParams(max_tokens=30)):
                break
        del engine
        sequences = live_sequences()
    finally:
        gc.enable()

    assert [each() for each in freed] == [None] * 3
    assert len(sequences) == len(others)


async def test_two_engines_live_in_one_loop() -> None:
    async with running() as (one, _), running() as (two, _):
        answers = await asyncio.gather(collect(one, "hello"), collect(two, "hello"))

    assert [output.outputs[0].text for output in answers[0]] == [output.outputs[0].text for output in answers[1]]


async def test_a_closed_engine_refuses_work() -> None:
    async with running() as (engine, _):
        pass

    with pytest.raises(NotReady):
        await collect(engine, "hello")


async def test_an_engine_that_was_closed_before_its_start_cannot_be_started() -> None:
    backend = FakeBackend()
    engine = EngineLoop(Engine(backend.info, ByteTokenizer(), EngineConfig(), LimitsConfig()), backend)  # type: ignore[arg-type]
    await engine.close()

    with pytest.raises(EngineError, match="cannot be started again"):
        await engine.start()


async def test_where_the_system_gives_no_thread_masks_are_filled_all_the_same(monkeypatch):
    backend = FakeBackend(max_model_len=64)
    async with EngineLoop(Engine(backend.info, ByteTokenizer(), EngineConfig(), LimitsConfig()), backend) as engine:
        refuse = ThreadPoolExecutor(1)
        refuse.shutdown()
        monkeypatch.setattr(engine, "_masks", refuse)
        wish = SamplingParams(structured=StructuredOutput(choice=["yes"]), max_tokens=8)

        texts = [output.outputs[0].text async for output in engine.generate("x", wish)]

    assert "".join(texts) == "yes"


def test_ctrl_c_within_the_loop_is_no_failure_of_the_engine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt(_: Engine) -> None:
        raise KeyboardInterrupt

    async def use() -> None:
        async with running() as (engine, _):
            monkeypatch.setattr(Engine, "schedule", interrupt)
            await collect(engine, "hello")

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(use())

    assert not caplog.records
