"""Logits processors in the engine: what they are called with, and what they keep other parts of it from doing."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from brlite.errors import EngineError, InvalidRequest
from tests.engine.conftest import MakeDriver
from tests.fakes import reference_tokens, repeating_token


class Recorder:
    """Changes nothing, and keeps the arguments of its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], ...]] = []

    def __call__(self, prompt: Sequence[int], output: Sequence[int], logits: Any) -> Any:
        self.calls.append((list(prompt), list(output)))
        return logits

    def tokens_before_each_draw(self) -> list[list[int]]:
        return [output for _, output in self.calls]


class Cloned(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.clones: list[Recorder] = []

    def clone(self) -> Recorder:
        self.clones.append(Recorder())
        return self.clones[-1]


@pytest.fixture
def slow_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of a processor takes half a second, of a clock of its own."""
    clock = SimpleNamespace(perf_counter=functools.partial(next, itertools.count(0, 0.5)))
    monkeypatch.setattr("brlite.backends.sampling.logits_processors.time", clock)


def beginnings(token_ids: list[int]) -> list[list[int]]:
    return [token_ids[:length] for length in range(len(token_ids))]


def test_a_processor_is_called_once_for_each_token_with_those_before_it(make_driver: MakeDriver):
    driver, recorder = make_driver(), Recorder()

    request_id = driver.submit("hello", max_tokens=5, logits_processors=[recorder])
    driver.finish()

    assert driver.token_ids(request_id) == reference_tokens(b"hello", 5)
    assert recorder.calls == [([*b"hello"], tokens) for tokens in beginnings(driver.token_ids(request_id))]
    assert driver.engine.stats.logits_processor_calls == 5


def test_processors_run_in_their_order_and_decide_the_token(make_driver: MakeDriver):
    def prefer_x(output: list[int], logits: Any) -> Any:
        logits[ord("x")] += 5
        return logits

    def not_twice(output: list[int], logits: Any) -> Any:
        if output[-1:] == [ord("x")]:
            logits[ord("x")] -= 10
            logits[ord("y")] += 5
        return logits

    driver = make_driver()
    request_id = driver.submit("hello", max_tokens=4, logits_processors=[prefer_x, not_twice])
    driver.finish()

    assert driver.text(request_id) == "xyxy"


def test_preemption_repeats_no_call(make_driver: MakeDriver):
    recorders = [Recorder() for _ in range(3)]
    driver = make_driver(num_blocks=9)

    ids = [
        driver.submit(prompt, max_tokens=12, logits_processors=[recorder])
        for prompt, recorder in zip(("first one", "second one", "third one"), recorders, strict=True)
    ]
    driver.finish()

    assert driver.engine.stats.preemptions > 0
    for request_id, recorder in zip(ids, recorders, strict=True):
        assert recorder.tokens_before_each_draw() == beginnings(driver.token_ids(request_id))


def test_each_answer_has_its_own_clone(make_driver: MakeDriver):
    driver, cloned = make_driver(), Cloned()

    request_id = driver.submit("hello", n=3, temperature=1.0, seed=1, max_tokens=4, logits_processors=[cloned])
    driver.finish()

    assert cloned.calls == []
    assert [clone.tokens_before_each_draw() for clone in cloned.clones] == [
        beginnings(driver.token_ids(request_id, index)) for index in range(3)
    ]


def test_a_processor_that_fails_ends_its_own_answer_alone(make_driver: MakeDriver, caplog: pytest.LogCaptureFixture):
    class FailsAtThird:
        num_clones = 0

        def __call__(self, output: list[int], logits: Any) -> Any:
            raise AssertionError("each answer has a clone")

        def clone(self) -> Callable[[list[int], Any], Any]:
            self.num_clones += 1
            fails = self.num_clones == 2

            def process(output: list[int], logits: Any) -> Any:
                if fails and len(output) == 2:
                    raise SystemExit("no more")
                return logits

            return process

    driver = make_driver()
    request_id = driver.submit("hello", n=3, max_tokens=4, logits_processors=[FailsAtThird()])
    other = driver.submit("other", max_tokens=4)
    driver.finish()

    outputs = sorted(driver.outputs[request_id].outputs, key=lambda output: output.index)
    assert [output.finish_reason for output in outputs] == ["length", "error", "length"]
    assert "FailsAtThird failed: SystemExit" in str(outputs[1].stop_reason)
    assert outputs[1].token_ids == outputs[0].token_ids[:2]
    assert driver.token_ids(other) == reference_tokens(b"other", 4)
    assert "no more" in caplog.text


def test_there_are_no_drafts_for_it_and_others_have_theirs(make_driver: MakeDriver):
    driver = make_driver(max_draft_tokens=4, next_token=repeating_token, num_blocks=64)
    recorder = Recorder()

    edited = driver.submit("abcabc", max_tokens=30, logits_processors=[recorder])
    driver.submit("bcabca", max_tokens=30)
    batches = driver.finish()

    drafted = {seq.seq_id for batch in batches for seq in batch.seqs if seq.num_draft_tokens}
    assert drafted == {1}
    assert recorder.tokens_before_each_draw() == beginnings(driver.token_ids(edited))


def test_no_step_is_decided_ahead_while_one_draws(make_driver: MakeDriver):
    driver, recorder = make_driver(can_run_ahead=True), Recorder()

    edited = driver.submit("hello", max_tokens=4, logits_processors=[recorder])
    other = driver.submit("other", max_tokens=9)
    driver.finish()

    assert recorder.tokens_before_each_draw() == beginnings(driver.token_ids(edited))
    assert driver.token_ids(other) == reference_tokens(b"other", 9)
    assert driver.engine.stats.steps_ahead == 5


@pytest.mark.usefixtures("slow_calls")
def test_a_slow_one_is_logged_once(make_driver: MakeDriver, caplog: pytest.LogCaptureFixture):
    driver = make_driver()

    with caplog.at_level(logging.WARNING):
        driver.submit("hello", max_tokens=4, logits_processors=[Recorder(), Recorder()])
        driver.finish()

    assert driver.engine.stats.logits_processor_calls == 8
    assert [record.getMessage() for record in caplog.records] == [
        "a call of the logits processor Recorder took 500 ms; all requests of the step waited for it"
    ]
    assert driver.engine.stats.logits_processor_seconds == 4


@pytest.mark.usefixtures("slow_calls")
def test_the_time_in_processors_cuts_no_prompt_into_smaller_chunks(make_driver: MakeDriver):
    chunks = []
    for processors in ([], [Recorder()]):
        driver = make_driver(
            budget=64,
            engine={"max_step_seconds": 2.0},
            step_seconds=lambda batch: sum(len(seq.token_ids) for seq in batch.seqs) / 16 + bool(batch.processors) / 2,
            max_model_len=512,
            num_blocks=512,
        )
        driver.submit("hello", max_tokens=40, logits_processors=processors)
        driver.submit("x" * 300, max_tokens=1)
        chunks.append([len(seq.token_ids) for batch in driver.finish() for seq in batch.seqs if len(seq.token_ids) > 5])

    assert min(chunks[0]) < 64
    assert chunks[1] == chunks[0]


def test_a_backend_that_cannot_refuses_by_name(make_driver: MakeDriver):
    driver = make_driver(runs_logits_processors=False)

    with pytest.raises(InvalidRequest, match="this server's engine") as caught:
        driver.submit("hello", logits_processors=[Recorder()])

    assert caught.value.param == "logits_processors"


def test_a_request_whose_processors_were_not_made_is_refused(make_driver: MakeDriver, monkeypatch: Any):
    driver = make_driver()
    monkeypatch.setattr(driver.engine.processor_maker, "make", lambda params: None)

    with pytest.raises(EngineError, match="were not made"):
        driver.submit("hello", logits_processors=[Recorder()])
