"""The engine's decisions and their consequences, stepped by hand on a fake model."""

from __future__ import annotations

import pytest

from brlite.engine.backend import SampledToken, SeqResult, StepResult
from brlite.engine.outputs import RequestOutput
from brlite.engine.request import Request
from brlite.errors import EngineError, InvalidRequest, PromptTooLong
from brlite.sampling_params import SamplingParams
from tests.engine.conftest import MakeDriver
from tests.fakes import BLOCK_SIZE, reference_tokens


def test_a_completion_is_what_the_model_says_token_by_token(make_driver: MakeDriver) -> None:
    driver = make_driver()

    request_id = driver.submit("hello", max_tokens=8)
    driver.finish()

    assert driver.token_ids(request_id) == reference_tokens(b"hello", 8)
    assert driver.outputs[request_id].outputs[0].finish_reason == "length"


def test_prompt_chunks_and_decodes_share_a_step_within_the_token_budget(make_driver: MakeDriver) -> None:
    driver = make_driver(budget=8)
    driver.submit("ab", max_tokens=16)
    driver.step()

    driver.submit("a long prompt of 27 letters", max_tokens=4)
    batches = driver.finish()

    assert [len(seq.token_ids) for seq in batches[0].seqs] == [1, 7]
    assert max(batch.num_tokens for batch in batches) <= 8


def test_a_shared_prefix_is_computed_once(make_driver: MakeDriver) -> None:
    driver = make_driver(budget=64)
    system = [7] * (2 * BLOCK_SIZE)
    driver.submit([*system, 1], max_tokens=1)
    driver.finish()

    second = driver.submit([*system, 2], max_tokens=1)
    batch = driver.step()

    assert batch is not None
    assert batch.seqs[0].start == len(system)
    assert driver.outputs[second].num_cached_tokens == len(system)


def test_prompts_with_different_salts_share_nothing(make_driver: MakeDriver) -> None:
    driver = make_driver(budget=64)
    prompt = [7] * (3 * BLOCK_SIZE)
    driver.submit(prompt, max_tokens=1, cache_salt="one")
    driver.finish()

    driver.submit(prompt, max_tokens=1, cache_salt="two")
    batch = driver.step()

    assert batch is not None
    assert batch.seqs[0].start == 0


def test_without_prefix_caching_requests_share_nothing_but_siblings_do(make_driver: MakeDriver) -> None:
    driver = make_driver(budget=64, engine={"prefix_caching": False})
    prompt = [7] * (3 * BLOCK_SIZE)
    driver.submit(prompt, max_tokens=1)
    driver.finish()

    driver.submit(prompt, n=2, max_tokens=1)
    batches = driver.finish()

    assert batches[0].seqs[0].start == 0
    assert batches[1].seqs[0].start == 2 * BLOCK_SIZE


@pytest.mark.parametrize("n", [2, 8])
def test_n_completions_cost_one_prefill_and_differ_by_their_seeds(make_driver: MakeDriver, n: int) -> None:
    driver = make_driver(budget=64, max_num_seqs=4)
    prompt = list(range(8 * BLOCK_SIZE))

    request_id = driver.submit(prompt, n=n, seed=5, temperature=1.0, max_tokens=6)
    batches = driver.finish()

    computed = sum(len(seq.token_ids) for batch in batches for seq in batch.seqs if seq.start < len(prompt))
    assert computed == len(prompt) + (n - 1) * BLOCK_SIZE
    assert len({tuple(driver.token_ids(request_id, index)) for index in range(n)}) == n
    assert driver.token_ids(request_id) == reference_tokens(prompt, 6, seed=5)


def test_the_gauges_count_sequences(make_driver: MakeDriver) -> None:
    driver = make_driver(max_num_seqs=4)
    driver.submit("abc", n=6, max_tokens=4)

    driver.step()
    driver.step()

    assert (driver.engine.stats.num_running, driver.engine.stats.num_waiting) == (4, 2)


def test_a_preempted_sequence_is_computed_again_and_says_the_same(make_driver: MakeDriver) -> None:
    driver = make_driver(num_blocks=9, max_num_seqs=3, max_model_len=32)

    request_ids = [driver.submit(prompt, max_tokens=16) for prompt in ("first!", "second", "third.")]
    driver.finish()

    assert driver.engine.stats.preemptions > 0
    for request_id, prompt in zip(request_ids, (b"first!", b"second", b"third."), strict=True):
        assert driver.token_ids(request_id) == reference_tokens(prompt, 16)


def test_at_most_max_num_seqs_sequences_run_at_once(make_driver: MakeDriver) -> None:
    driver = make_driver(max_num_seqs=2)

    for _ in range(6):
        driver.submit("hello", max_tokens=5)
    batches = driver.finish()

    assert max(len(batch.seqs) for batch in batches) == 2
    assert len(driver.outputs) == 6


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_an_abort_at_any_moment_frees_everything_at_the_next_step(make_driver: MakeDriver, num_steps: int) -> None:
    driver = make_driver(budget=8)
    request_id = driver.submit("a prompt that takes several chunks", n=3, max_tokens=30)
    for _ in range(num_steps):
        driver.step()

    driver.engine.abort(request_id)
    batch = driver.step()

    assert batch is None
    assert driver.engine.stats.num_used_blocks == 0
    assert {output.finish_reason for output in driver.outputs[request_id].outputs} == {"abort"}


def test_an_abort_during_a_step_takes_effect_when_the_step_returns(make_driver: MakeDriver) -> None:
    driver = make_driver()
    request_id = driver.submit("hello", max_tokens=8)
    batch = driver.engine.schedule()
    assert batch is not None

    driver.engine.abort(request_id)
    driver.engine.update(driver.backend.execute(batch))

    assert not driver.engine.has_work
    assert driver.engine.stats.num_used_blocks == 0


def test_a_sequence_that_fails_ends_its_own_request_only(make_driver: MakeDriver) -> None:
    driver = make_driver(fault=lambda seq: "logits are not finite" if seq.token_ids[0] == ord("X") else None)

    bad, good = driver.submit("XYZ", n=2), driver.submit("abc")
    driver.finish()

    assert isinstance(driver.errors[bad], EngineError)
    assert driver.token_ids(good) == reference_tokens(b"abc", 8)


def test_the_blocks_of_a_sequence_that_failed_are_not_found_again(make_driver: MakeDriver) -> None:
    driver = make_driver(budget=8, fault=lambda seq: "not finite" if seq.start == 16 and seq.sampling else None)
    driver.submit([7] * 20)
    driver.finish()

    driver.submit([7] * 20)
    batch = driver.step()

    assert batch is not None
    assert batch.seqs[0].start == 0


def test_a_step_that_raises_ends_the_requests_in_it_and_the_engine_goes_on(make_driver: MakeDriver) -> None:
    def fault(seq: object) -> None:
        if len(driver.backend.batches) == 2:
            raise RuntimeError("out of memory")

    driver = make_driver(fault=fault)
    first = driver.submit("abc")
    driver.step()
    driver.step()

    later = driver.submit("abc")
    driver.finish()

    assert isinstance(driver.errors[first], EngineError)
    assert driver.token_ids(later) == reference_tokens(b"abc", 8)
    assert driver.engine.stats.step_failures == 1


def test_a_reader_that_fails_does_not_harm_the_others(make_driver: MakeDriver) -> None:
    driver = make_driver()
    good = driver.submit("abc")
    request = driver.engine._requests[driver.submit("def")].request
    driver.engine.abort(request.request_id)
    driver.step()

    def broken(output: object) -> None:
        raise ValueError("the reader broke")

    driver.engine.add_request(request, broken)
    driver.finish()

    assert driver.token_ids(good) == reference_tokens(b"abc", 8)


def test_a_text_sink_gets_what_is_text_alone_and_the_sink_gets_the_rest(make_driver: MakeDriver) -> None:
    driver = make_driver()
    alone = driver.submit("abc", max_tokens=12)
    driver.finish()
    texts, outputs = list[str](), list[RequestOutput]()

    def take_text(text: str, num_tokens: int) -> bool:
        if not outputs or len(texts) == 5:  # the first delta tells more than text; later the reader is busy
            texts.append("")
            return False
        texts.append(text)
        assert num_tokens == 1
        return True

    request = Request(
        request_id="r", prompt_token_ids=list(b"abc"), params=SamplingParams(temperature=0, max_tokens=12)
    )
    driver.engine.add_request(request, outputs.append, take_text)  # type: ignore[arg-type]
    driver.finish()

    first, busy, last = outputs
    text = [*texts[:5], busy.outputs[0].text, *texts[6:]]
    assert first.outputs[0].text + "".join(text) + last.outputs[0].text == driver.text(alone)
    assert last.finished
    assert last.outputs[0].finish_reason == "length"
    assert driver.engine.stats.generation_tokens == 24


@pytest.mark.parametrize("params", [{"n": 2}, {"logprobs": 1}])
def test_a_text_sink_gets_nothing_of_a_request_with_more_than_text(
    make_driver: MakeDriver, params: dict[str, int]
) -> None:
    driver, outputs = make_driver(), list[RequestOutput]()

    request = Request(
        request_id="r", prompt_token_ids=list(b"abc"), params=SamplingParams(temperature=0, max_tokens=4, **params)
    )  # type: ignore[arg-type]
    driver.engine.add_request(request, outputs.append, lambda text, num_tokens: True)  # type: ignore[arg-type]
    driver.finish()

    assert sum(len(each.token_ids) for output in outputs for each in output.outputs) == 4 * params.get("n", 1)


def test_a_text_sink_that_fails_ends_its_own_request_alone(make_driver: MakeDriver) -> None:
    driver, outputs = make_driver(), list[object]()
    good = driver.submit("abc")

    def broken(text: str, num_tokens: int) -> bool:
        raise ValueError("the reader broke")

    request = Request(
        request_id="r", prompt_token_ids=list(b"def"), params=SamplingParams(temperature=0, max_tokens=100)
    )
    driver.engine.add_request(request, outputs.append, broken)
    driver.finish()

    assert driver.token_ids(good) == reference_tokens(b"abc", 8)
    assert outputs == []
    assert driver.engine.stats.finished["abort"] == 1


@pytest.mark.parametrize(
    ("prompt", "params", "param"),
    [
        ([], {}, "prompt"),
        ([260], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1], {"n": 10**9}, "n"),
        ([1], {"logprobs": 21}, "logprobs"),
        ([1], {"top_k": 261}, "top_k"),
        ([1], {"stop": ["x"] * 17}, "stop"),
        ([1], {"stop": ["x" * 257]}, "stop"),
        ([1], {"stop_token_ids": [260]}, "stop_token_ids"),
        ([1], {"logit_bias": {260: 1.0}}, "logit_bias"),
    ],
)
def test_what_can_never_be_served_is_refused_at_the_door(
    make_driver: MakeDriver, prompt: list[int], params: dict[str, object], param: str
) -> None:
    driver = make_driver()

    with pytest.raises(InvalidRequest) as caught:
        driver.submit(prompt, **params)

    assert caught.value.param == param
    assert not driver.engine.has_work


def test_a_prompt_of_the_whole_context_is_refused_and_one_token_less_is_served(make_driver: MakeDriver) -> None:
    driver = make_driver(max_model_len=64)

    with pytest.raises(PromptTooLong, match="maximum context length is 64 tokens"):
        driver.submit([1] * 64)
    request_id = driver.submit([1] * 63)
    driver.finish()

    assert len(driver.token_ids(request_id)) == 1


def test_a_cache_smaller_than_the_context_is_the_limit_that_counts(make_driver: MakeDriver) -> None:
    driver = make_driver(num_blocks=4, max_model_len=64)

    with pytest.raises(PromptTooLong, match="maximum context length is 16 tokens"):
        driver.submit([1] * 16)
    asked, unasked = driver.submit([1] * 10, max_tokens=20), driver.submit([1] * 10, max_tokens=None)
    driver.finish()

    assert len(driver.token_ids(asked)) == len(driver.token_ids(unasked)) == 6
    assert driver.outputs[asked].warnings == ("max_tokens 20 was cut to 6, what the context has left",)
    assert driver.outputs[unasked].warnings == ()


def test_a_prompt_that_its_caller_changes_later_stays_what_it_was(make_driver: MakeDriver) -> None:
    driver = make_driver()
    prompt = list(b"hello")

    request_id = driver.submit(prompt, max_tokens=4)
    prompt.extend(b"more")
    driver.finish()

    assert driver.token_ids(request_id) == reference_tokens(b"hello", 4)


def test_an_engine_counts_on_from_the_one_before_it(make_driver: MakeDriver) -> None:
    first, second = (make_driver(num_blocks=9, max_num_seqs=3, max_model_len=32) for _ in range(2))
    counted = []

    for driver in (first, second):
        driver.engine.continue_stats(first.engine.stats)
        for prompt in ("first!", "second", "third."):
            driver.submit(prompt, max_tokens=16)
        driver.finish()
        counted.append((driver.engine.stats.preemptions, driver.engine.stats.generation_tokens))

    assert counted[0][0] > 0
    assert counted[1] == (2 * counted[0][0], 2 * counted[0][1])


def test_an_aborted_request_counts_as_aborted_whatever_its_first_completion_did(make_driver: MakeDriver) -> None:
    driver = make_driver(max_num_seqs=1)
    request_id = driver.submit("abc", n=2, max_tokens=2)
    for _ in range(3):
        driver.step()

    driver.engine.abort(request_id)
    driver.finish()

    assert dict(driver.engine.stats.finished) == {"abort": 1}


@pytest.mark.parametrize(("prompt_length", "asked", "allowed"), [(4, 40, 32), (50, 20, 14), (4, 32, 32)])
def test_max_tokens_is_cut_to_what_is_allowed_and_the_answer_says_so(
    make_driver: MakeDriver, prompt_length: int, asked: int, allowed: int
) -> None:
    driver = make_driver(max_model_len=64)

    request_id = driver.submit([1] * prompt_length, max_tokens=asked)
    driver.finish()

    assert len(driver.token_ids(request_id)) == allowed
    assert bool(driver.outputs[request_id].warnings) == (asked != allowed)


def test_a_request_that_an_error_ends_gets_no_token_of_that_step(make_driver: MakeDriver) -> None:
    driver, taken = make_driver(), list[object]()
    request = Request(request_id="two", prompt=None, prompt_token_ids=[1, 2], params=SamplingParams(n=2, max_tokens=9))
    driver.engine.add_request(request, taken.append)
    while len(batch := driver.engine.schedule().seqs) < 2:  # the prompt alone comes first
        driver.engine.update(StepResult([SeqResult(seq.seq_id, [SampledToken(97)]) for seq in batch]))
    taken.clear()

    first, second = (seq.seq_id for seq in batch)
    driver.engine.update(StepResult([SeqResult(first, [SampledToken(97)]), SeqResult(second, error="broken")]))

    assert [type(each) for each in taken] == [EngineError]


def test_a_request_id_in_use_is_refused(make_driver: MakeDriver) -> None:
    driver = make_driver()
    driver.submit("abc", request_id="same")

    with pytest.raises(InvalidRequest, match="in use"):
        driver.submit("abc", request_id="same")
