"""An engine of the contract behind brlite's own: its calls, and that texts do not depend on what it can do."""

from __future__ import annotations

import itertools
import threading
from _thread import interrupt_main
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from brlite.backends.plugins.contract import PluginRow
from brlite.backends.plugins.slot_backend import STEP_FAILED, SlotBackend
from brlite.backends.plugins.toy import ToyEngine, token_logits
from brlite.backends.plugins.toy_text import ASSISTANT, USER, toy_tokenizer
from brlite.backends.sampling.reference import token_logprobs
from brlite.backends.sampling.rows import NumpyRows
from brlite.config.options import EngineConfig, LimitsConfig, ModelSpec
from brlite.engine.backend import Batch, SamplingInput, ScheduledSeq, TokenMasks
from brlite.engine.engine import Engine
from brlite.engine.outputs import RequestOutput
from brlite.engine.request import Request
from brlite.errors import BackendLost, BrliteError, ConfigError, EngineError, InvalidRequest
from brlite.sampling_params import SamplingParams
from tests.backends.plugins.toys import (
    CONFIG,
    SPEC,
    LooseRecorder,
    LooseToy,
    Recorder,
    StiffRecorder,
    StiffToy,
    WrongWidth,
)

TOKENIZER = toy_tokenizer()
GREEDY = SamplingParams(temperature=0, max_tokens=40)
PROMPTS = ["one", "a second prompt", "x", "", "a fifth, longer than the others"]


class SingleToy(LooseToy):
    """One token in a row, whatever it is."""

    claims: ClassVar[dict[str, Any]] = {**LooseToy.claims, "max_row_tokens": 1}


class MixingToy(LooseToy):
    """One prompt, beside decodes."""

    claims: ClassVar[dict[str, Any]] = {"can_mix_rows": True}


class InterruptedToy(ToyEngine):
    """Ctrl-C comes while its first step is computed."""

    def step(self, rows: Sequence[PluginRow]) -> Any:
        logits = super().step(rows)
        if self._num_steps == 1:
            interrupt_main()
        return logits


ENGINES = [ToyEngine, LooseToy, StiffToy, SingleToy, MixingToy]


class Service:
    """A backend with an engine that drives it, and what requests got."""

    def __init__(self, engine: ToyEngine, spec: ModelSpec = SPEC, **config: Any) -> None:
        self.toy = engine
        self.config = EngineConfig(name="toy", **config)
        self.backend = SlotBackend(engine, spec, self.config)
        self.engine = Engine(self.backend.info, TOKENIZER, self.config, LimitsConfig())
        self._numbers = itertools.count()
        self.outputs: dict[str, RequestOutput] = {}
        self.errors: dict[str, BrliteError] = {}

    def add(self, prompt: str, params: SamplingParams = GREEDY) -> str:
        request_id = f"request {next(self._numbers)}"
        token_ids = TOKENIZER.encode(prompt)
        request = Request(request_id=request_id, prompt_token_ids=token_ids, params=params)
        self.engine.add_request(request, lambda output: self._receive(request_id, output))
        return request_id

    def step(self) -> bool:
        batch = self.engine.schedule()
        if batch is None:
            return False
        try:
            result = self.backend.execute(batch)
        except Exception as error:
            self.engine.fail(error)
        else:
            self.engine.update(result)
        return True

    def run(self) -> None:
        while self.step():
            pass
        self.engine.check_integrity()

    def texts(self, *request_ids: str) -> list[str]:
        self.run()
        return [completion.text for request_id in request_ids for completion in self.outputs[request_id].outputs]

    def _receive(self, request_id: str, output: RequestOutput | BrliteError) -> None:
        if isinstance(output, BrliteError):
            self.errors[request_id] = output
        elif request_id in self.outputs:
            self.outputs[request_id].merge(output)
        else:
            self.outputs[request_id] = output


@pytest.fixture
def serve() -> Iterator[Any]:
    services: list[Service] = []

    def start(engine: ToyEngine, spec: ModelSpec = SPEC, **config: Any) -> Service:
        services.append(Service(engine, spec, **config))
        return services[-1]

    yield start
    for service in services:
        service.backend.close()


# Texts


@pytest.mark.parametrize("make", ENGINES)
@pytest.mark.parametrize("budget", [3, 7, 128])
def test_a_text_does_not_depend_on_what_the_engine_can_do(serve: Any, make: type[ToyEngine], budget: int) -> None:
    service = serve(make(), max_num_batched_tokens=budget)

    texts = service.texts(*[service.add(prompt) for prompt in PROMPTS])

    assert texts == PROMPTS


@pytest.mark.parametrize("make", ENGINES[1:])
def test_draws_and_logprobs_do_not_either(serve: Any, make: type[ToyEngine]) -> None:
    wild = {"temperature": 6.0, "max_tokens": 20, "ignore_eos": True, "logprobs": 3}
    every_params = [
        SamplingParams(seed=1, n=3, **wild),
        SamplingParams(seed=2, top_p=0.8, frequency_penalty=0.5, **wild),
        SamplingParams(seed=3, top_k=5, min_tokens=9, prompt_logprobs=None, **wild),
        SamplingParams(seed=4, logit_bias={97: 100.0}, repetition_penalty=1.3, stop=("aa",), **wild),
    ]
    outputs = []
    for engine in (ToyEngine(), make()):
        service = serve(engine)
        ids = [service.add(prompt, params) for prompt, params in zip(PROMPTS, every_params, strict=False)]
        service.run()
        outputs.append([service.outputs[request_id].outputs for request_id in ids])

    assert outputs[0] == outputs[1]
    assert len({tuple(completion.token_ids) for completion in outputs[0][0]}) == 3


@pytest.mark.parametrize("make", [ToyEngine, LooseToy, SingleToy])
def test_prompt_logprobs_are_those_of_every_position(serve: Any, make: type[ToyEngine]) -> None:
    service = serve(make(), max_num_batched_tokens=4)
    request_id = service.add("a prompt", SamplingParams(max_tokens=1, prompt_logprobs=2))
    service.run()

    first, *found = service.outputs[request_id].prompt_logprobs

    token_ids = TOKENIZER.encode("a prompt")
    logits = np.stack([token_logits(np.array(token_ids[:end], np.int32)) for end in range(1, len(token_ids))])
    assert first is None
    assert found == token_logprobs(NumpyRows(logits), token_ids[1:], 2)


def test_prompt_logprobs_are_refused_at_the_door_where_they_cannot_be_had(serve: Any) -> None:
    service = serve(StiffToy())

    with pytest.raises(InvalidRequest) as refusal:
        service.add("a prompt", SamplingParams(prompt_logprobs=0))

    assert refusal.value.param == "prompt_logprobs"
    assert any("prompt_logprobs are refused" in note for note in service.backend.info.notes)


# Calls


def test_a_step_that_is_not_allowed_comes_in_calls_that_are(serve: Any) -> None:
    service = serve(Recorder())
    service.add("first")
    service.step()
    service.add("2")
    service.add("3")

    service.step()

    decode, *prompts = service.toy.calls[1:]
    assert [(slot, len(token_ids)) for slot, _, token_ids in decode] == [(0, 1)]
    assert [[(slot, start) for slot, start, _ in call] for call in prompts] == [[(1, 0)], [(2, 0)]]
    assert set(service.toy.num_rows) == {SPEC.build_batch}


def test_a_step_that_is_allowed_is_one_call_without_idle_slots(serve: Any) -> None:
    service = serve(LooseRecorder())
    service.add("first")
    service.step()
    service.add("2")

    service.step()

    assert [[(slot, len(token_ids)) for slot, _, token_ids in call] for call in service.toy.calls] == [
        [(0, 7)],
        [(0, 1), (1, 3)],
    ]
    assert service.toy.num_rows == [1, 2]


def test_a_prompt_waits_until_it_is_whole_where_it_must_be(serve: Any) -> None:
    service = serve(StiffRecorder(), max_num_batched_tokens=4)
    request_id = service.add("a prompt of many chunks")

    texts = service.texts(request_id)

    assert texts == ["a prompt of many chunks"]
    assert service.toy.calls[0] == [(0, 0, TOKENIZER.encode("a prompt of many chunks"))]
    assert all(len(call[0][2]) == 1 for call in service.toy.calls[1:])


def test_a_slot_is_released_before_somebody_else_gets_it(serve: Any) -> None:
    service = serve(Recorder(), ModelSpec(name="toy", build_seq=96, build_batch=1))

    texts = service.texts(service.add("first"), service.add("second"), service.add("third"))

    assert texts == ["first", "second", "third"]
    assert service.toy.released == [0, 0]


def test_the_slot_of_an_aborted_request_is_anothers(serve: Any) -> None:
    service = serve(Recorder(), ModelSpec(name="toy", build_seq=96, build_batch=1), max_num_batched_tokens=4)
    aborted = service.add("a prompt that is not done yet")
    service.step()
    service.engine.abort(aborted)

    texts = service.texts(service.add("another"))

    assert texts == ["another"]
    assert service.toy.released == [0]


def test_all_calls_come_from_one_thread_that_is_not_the_callers(serve: Any) -> None:
    service = serve(Recorder())
    service.texts(service.add("one"), service.add("two"), service.add("three"), service.add("four"))
    service.backend.close()

    assert len(set(service.toy.threads)) == 1
    assert threading.get_ident() not in service.toy.threads
    assert "brlite-engine-calls" not in [thread.name for thread in threading.enumerate()]


def test_a_context_is_used_to_its_last_token(serve: Any) -> None:
    service = serve(ToyEngine(), ModelSpec(name="toy", build_seq=32, build_batch=2))
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=16)

    request_id = service.add("fourteen chars", params)

    assert service.texts(request_id) == ["fourteen charsf"]
    assert service.outputs[request_id].outputs[0].finish_reason == "length"


# What goes wrong


class FailsOnX(ToyEngine):
    """Raises for a prompt with an x in it, once it has touched the slot."""

    def compute(self, step):
        super().compute(step)
        if step.token_ids.shape[1] > 1 and (step.token_ids == ord("x")).any():
            raise MemoryError("no more memory on the card")


def test_a_call_that_fails_ends_its_own_requests_only(serve: Any) -> None:
    service = serve(FailsOnX())
    first = service.add("first")
    service.step()
    wrong, third = service.add("xyz"), service.add("third")

    texts = service.texts(first, third)

    assert texts == ["first", "third"]
    assert str(service.errors[wrong]) == STEP_FAILED


def test_a_slot_whose_call_failed_is_good_for_the_next_request(serve: Any) -> None:
    service = serve(FailsOnX(), ModelSpec(name="toy", build_seq=96, build_batch=1))
    wrong, right = service.add("xyz"), service.add("right")

    texts = service.texts(right)

    assert texts == ["right"]
    assert wrong in service.errors
    assert service.engine.stats.step_failures == 1


def test_a_slot_whose_step_was_interrupted_is_good_for_the_next_request(serve: Any) -> None:
    service = serve(InterruptedToy())
    service.add("one")
    with pytest.raises(KeyboardInterrupt):
        service.run()

    service.engine.reset()
    again = service.add("one")

    assert service.texts(again) == ["one"]


def test_a_row_of_nan_ends_its_request_only(serve: Any) -> None:
    service = serve(ToyEngine(), options={"nan_every": 5})
    lost, other = service.add("first"), service.add("second")

    texts = service.texts(other)

    assert texts == ["second"]
    assert "not finite" in str(service.errors[lost])


def test_an_engine_that_is_lost_loses_the_backend(serve: Any) -> None:
    service = serve(ToyEngine(), options={"lost_at": 2})
    service.add("one")
    service.add("two")

    batch = service.engine.schedule()

    with pytest.raises(BackendLost, match="lost at step 2"):
        service.backend.execute(batch)


def test_logits_of_another_form_than_promised_are_an_error(serve: Any, caplog: pytest.LogCaptureFixture) -> None:
    service = serve(WrongWidth())
    request_id = service.add("one")
    service.run()

    assert request_id in service.errors
    assert "logits are float32 (3, 259); promised are float32 (3, 260)" in caplog.text


def test_a_step_draws_what_its_masks_allow(serve: Any) -> None:
    service = serve(ToyEngine())
    sampling = SamplingInput(params=GREEDY, seed=0, position=0)
    seqs = [ScheduledSeq(seq_id, 0, [USER, ASSISTANT], [seq_id], sampling) for seq_id in range(2)]
    masks = TokenMasks(service.backend.info.vocab_size, {0: 1})
    masks.words[4] = 0b100  # token 34
    late = threading.Timer(0.2, masks.publish, (0,))
    late.start()

    masked = service.backend.execute(Batch(seqs, masks)).seqs

    assert masked[0].tokens[0].token_id == 34
    assert masked[1].tokens[0].token_id != 34
    late.join()


def test_a_sequence_that_goes_on_where_its_slot_does_not_end_is_an_error(serve: Any) -> None:
    service = serve(ToyEngine())
    seq = ScheduledSeq(0, 5, [65], [0], SamplingInput(params=GREEDY, seed=0, position=0))

    with pytest.raises(EngineError, match="slot 0 holds 0 tokens, and the step goes on at 5"):
        service.backend.execute(Batch([seq]))


def test_an_engine_that_does_not_open_leaves_no_thread() -> None:
    class Closed(ToyEngine):
        def open(self, spec, config):
            raise ConfigError("no licence")

    with pytest.raises(ConfigError, match="no licence"):
        SlotBackend(Closed(), SPEC, CONFIG)

    assert "brlite-engine-calls" not in [thread.name for thread in threading.enumerate()]


def test_an_engine_that_holds_less_than_was_asked_for_says_so(serve: Any) -> None:
    class Small(LooseToy):
        claims: ClassVar[dict[str, Any]] = {"max_seqs": 2, "max_model_len": 48}

    service = serve(Small())

    info = service.backend.info
    assert (info.max_num_seqs, info.max_model_len, info.num_blocks, info.block_size) == (2, 48, 2, 48)
    assert "engine toy: it has build_batch 2, and the config asks for 3" in info.notes
    assert "engine toy: it has build_seq 48, and the config asks for 96" in info.notes


def test_what_is_off_is_said_aloud(serve: Any) -> None:
    notes = [serve(ToyEngine(), prefix_caching=caching).backend.info.notes for caching in (True, False)]

    assert "computed in full" in notes[0][0]
    assert notes[1] == ()


def test_a_closed_backend_may_be_closed_again(serve: Any) -> None:
    service = serve(ToyEngine())

    service.backend.close()
    service.backend.close()

    with pytest.raises(EngineError, match="closed"):
        service.backend.execute(Batch([ScheduledSeq(0, 0, [USER, ASSISTANT], [0])]))
