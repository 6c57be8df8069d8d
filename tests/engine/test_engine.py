"""The engine's decisions and their consequences, stepped by hand on a fake model."""

from __future__ import annotations

from array import array
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brlite.config.options import LimitsConfig
from brlite.engine.backend import SampledToken, ScheduledSeq, SeqResult, StepResult, Undrawn
from brlite.engine.outputs import RequestOutput, TokenLogprob
from brlite.engine.request import Request, TokenCounts
from brlite.errors import EngineError, InvalidRequest, PromptTooLong, QueueFull, QueueTimeout
from brlite.sampling_params import SamplingParams
from tests.engine.conftest import MakeDriver
from tests.fakes import BLOCK_SIZE, EOS, VOCAB_SIZE, reference_tokens


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


def test_many_completions_of_one_request_do_not_hold_up_those_who_wait(make_driver: MakeDriver) -> None:
    driver = make_driver(max_num_seqs=2, num_blocks=200)
    many = driver.submit("many", n=40, max_tokens=8)
    driver.step()

    small = [driver.submit(f"small {number}", max_tokens=1) for number in range(3)]
    driver.finish()

    assert [name for name in driver.finished if name != many] == small
    assert driver.finished[-1] == many


def test_requests_that_were_aborted_do_not_fill_the_queue(make_driver: MakeDriver) -> None:
    driver = make_driver(limits=LimitsConfig(max_waiting=1))
    driver.engine.abort(driver.submit("first"))

    second = driver.submit("second")
    driver.finish()

    assert driver.outputs[second].finished


def test_a_request_whose_completions_wait_is_still_in_the_queue(make_driver: MakeDriver) -> None:
    driver = make_driver(max_num_seqs=1, limits=LimitsConfig(max_waiting=1))
    driver.submit("many", n=9, max_tokens=4)
    driver.step()

    with pytest.raises(QueueFull):
        driver.submit("another")

    driver.finish()
    driver.submit("another")


def test_an_exempt_request_outlasts_the_time_limit_of_the_queue(make_driver: MakeDriver) -> None:
    driver = make_driver(max_num_seqs=1, limits=LimitsConfig(max_wait_seconds=5.0))
    driver.submit("running", max_tokens=20)
    driver.step()

    request_id = driver.submit("waiting", is_exempt_from_queue_timeout=True)
    driver.finish()

    assert driver.outputs[request_id].finished


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


def test_prompt_logprobs_are_right_after_a_preemption(make_driver: MakeDriver) -> None:
    driver = make_driver(num_blocks=10, max_num_seqs=3, max_model_len=32, budget=4)
    first = driver.submit("first!", max_tokens=16)
    driver.step()

    request_id = driver.submit("a second prompt", prompt_logprobs=0, max_tokens=12)
    third = driver.submit("third.", max_tokens=16)
    driver.finish()

    assert driver.engine.stats.preemptions > 0
    logprobs = driver.outputs[request_id].prompt_logprobs or []
    assert [entry and entry.token_id for entry in logprobs[1:]] == list(b" second prompt")
    assert driver.token_ids(first) == reference_tokens(b"first!", 16)
    assert driver.token_ids(third) == reference_tokens(b"third.", 16)


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


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(make_driver: MakeDriver) -> None:
    driver = make_driver(max_num_seqs=1, limits=LimitsConfig(max_waiting=2))
    driver.submit("running")
    driver.step()
    driver.submit("waiting")
    driver.submit("waiting")

    with pytest.raises(QueueFull) as caught:
        driver.submit("too many")

    assert caught.value.retry_after_seconds is not None
    assert caught.value.retry_after_seconds >= 1


def test_a_request_that_is_refused_displaces_none_from_a_full_queue(make_driver: MakeDriver) -> None:
    driver = make_driver(max_num_seqs=1, limits=LimitsConfig(max_waiting=1, max_beam_width=VOCAB_SIZE))
    driver.submit("running")
    driver.step()
    waiting = driver.submit("waiting", priority=1)

    with pytest.raises(InvalidRequest, match="best_of"):
        driver.submit("more beams than tokens", use_beam_search=True, best_of=VOCAB_SIZE)
    driver.finish()

    assert not driver.errors
    assert driver.outputs[waiting].finished


def test_exempt_parts_do_not_fill_the_queue(make_driver: MakeDriver) -> None:
    driver = make_driver(max_num_seqs=1, limits=LimitsConfig(max_waiting=2))

    driver.submit("first part")
    parts = [driver.submit(f"part {number}", is_exempt_from_queue_timeout=True) for number in range(5)]
    driver.submit("somebody else")
    driver.finish()

    assert all(driver.outputs[part].finished for part in parts)


def test_a_request_that_waited_too_long_ends_with_an_error(make_driver: MakeDriver) -> None:
    driver = make_driver(max_num_seqs=1, limits=LimitsConfig(max_wait_seconds=5.0))
    served = driver.submit("running", max_tokens=20)
    driver.step()

    overdue = driver.submit("waiting")
    driver.finish()

    assert isinstance(driver.errors[overdue], QueueTimeout)
    assert len(driver.token_ids(served)) == 20


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


def test_eos_ends_a_completion_unless_it_is_ignored(make_driver: MakeDriver) -> None:
    driver = make_driver(next_token=lambda context, seed: EOS if len(context) == 6 else ord("a"))

    stopped, ignored = driver.submit("abc"), driver.submit("abc", ignore_eos=True)
    driver.finish()

    assert driver.text(stopped) == "aaa"
    assert driver.outputs[stopped].outputs[0].finish_reason == "stop"
    assert len(driver.token_ids(ignored)) == 8


def test_a_stop_string_across_tokens_ends_the_text_before_it(make_driver: MakeDriver) -> None:
    letters = b"one two three"
    driver = make_driver(next_token=lambda context, seed: letters[len(context) - 3])

    cut = driver.submit("abc", stop="two", max_tokens=13)
    kept = driver.submit("abc", stop=["two"], include_stop_str_in_output=True, max_tokens=13)
    driver.finish()

    assert driver.text(cut) == "one "
    assert driver.text(kept) == "one two"
    assert driver.outputs[cut].outputs[0].stop_reason == "two"


def test_a_stop_token_ends_the_text_and_is_named(make_driver: MakeDriver) -> None:
    letters = b"one two three"
    driver = make_driver(next_token=lambda context, seed: letters[len(context) - 3])

    request_id = driver.submit("abc", stop_tokens_ids=[ord(" ")], max_tokens=13)
    driver.finish()

    assert driver.text(request_id) == "one"
    assert driver.outputs[request_id].outputs[0].stop_reason == ord(" ")


def test_tokens_that_would_end_the_text_are_banned_until_min_tokens(make_driver: MakeDriver) -> None:
    driver = make_driver()

    driver.submit("abc", min_tokens=2, stop_token_ids=[5], max_tokens=4)
    batches = driver.finish()

    inputs = [batch.seqs[0].sampling for batch in batches]
    assert [sampling and sampling.banned_token_ids for sampling in inputs] == [(EOS, 5), (EOS, 5), (), ()]


def test_the_token_that_would_complete_a_bad_word_is_banned(make_driver: MakeDriver) -> None:
    driver = make_driver(next_token=lambda context, seed: b"a cat, cat"[len(context) - 3])

    request_id = driver.submit("xca", bad_words=["cat", " cow", "z"], max_tokens=10)
    batches = driver.finish()

    inputs = [batch.seqs[0].sampling for batch in batches]
    banned = ["".join(map(chr, sampling.banned_token_ids)) for sampling in inputs if sampling]
    assert banned == ["z", "z", "z", "z", "tz", "z", "z", "z", "z", "tz"]  # the prompt's end begins no word
    assert driver.text(request_id) == "a caa, caa"


def test_a_preemption_does_not_hide_the_beginning_of_a_bad_word(make_driver: MakeDriver) -> None:
    driver = make_driver(num_blocks=6, next_token=lambda context, seed: b"xyz"[len(context) % 3])

    ids = [driver.submit([index] * 3, bad_words=["yz"], max_tokens=15, n=2) for index in range(3)]
    driver.finish()

    assert driver.engine.stats.preemptions > 0
    assert {driver.text(each, index) for each in ids for index in (0, 1)} == {"xya" * 5}


def test_a_request_whose_bad_words_were_not_encoded_is_refused(make_driver: MakeDriver) -> None:
    engine = make_driver().engine
    request = Request(request_id="x", prompt_token_ids=[1], params=SamplingParams(bad_words="no"))

    with pytest.raises(EngineError, match="bad words"):
        engine.add_request(request, print)


def test_penalties_see_no_more_than_the_last_tokens_where_that_is_asked_for(make_driver: MakeDriver) -> None:
    driver = make_driver(next_token=lambda context, seed: b"abac"[len(context) % 4])

    driver.submit("xyz", repetition_penalty=1.5, repeat_last_n=3, max_tokens=4, min_tokens=4)
    driver.submit("xyz", repetition_penalty=1.5, repeat_last_n=0, max_tokens=1)
    batches = driver.finish()

    seen = [
        [
            dict(zip(bytes(sampling.counted_token_ids[::4]).decode(), sampling.output_counts[::4], strict=True))
            for seq in batch.seqs
            if (sampling := seq.sampling)
        ]
        for batch in batches
    ]
    assert seen[0] == [{"x": 0, "y": 0, "z": 0}, {}]
    assert [each[0] for each in seen[1:]] == [
        {"y": 0, "z": 0, "c": 1},
        {"z": 0, "c": 1, "a": 1},
        {"c": 1, "a": 1, "b": 1},
    ]


@given(
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=8),
    output=st.lists(st.integers(0, 3), max_size=12),
    num_last=st.integers(-1, 9).filter(bool),
)
def test_the_counts_of_a_window_are_those_of_its_tokens(prompt: list[int], output: list[int], num_last: int) -> None:
    counts = TokenCounts(prompt, num_last)
    for token_id in output:
        counts.add(token_id)

    text = [(token_id, 0) for token_id in prompt] + [(token_id, 1) for token_id in output]
    expected = Counter[int]()
    for token_id, is_output in text[-num_last:] if num_last > 0 else text:
        expected[token_id] += is_output
    token_ids, output_counts = array("i", counts.token_ids), array("i", counts.output_counts)
    assert dict(zip(token_ids, output_counts, strict=True)) == dict(expected)


def test_penalties_send_the_tokens_seen_with_their_counts(make_driver: MakeDriver) -> None:
    driver = make_driver(next_token=lambda context, seed: ord("a"))

    driver.submit("ab", presence_penalty=0.5, max_tokens=3)
    sampling = driver.finish()[2].seqs[0].sampling

    assert sampling is not None
    assert sampling.counted_token_ids == b"".join(letter.to_bytes(4, "little") for letter in b"ab")
    assert sampling.output_counts == (2).to_bytes(4, "little") + (0).to_bytes(4, "little")


def test_prompt_logprobs_cover_every_prompt_token_whatever_the_chunks(make_driver: MakeDriver) -> None:
    driver = make_driver(budget=4)
    driver.submit("a prompt of some length", max_tokens=1)
    driver.finish()

    request_id = driver.submit("a prompt of some length", prompt_logprobs=2, max_tokens=2)
    driver.finish()

    logprobs = driver.outputs[request_id].prompt_logprobs
    assert logprobs is not None
    assert logprobs[0] is None
    assert [entry and entry.token_id for entry in logprobs[1:]] == list(b" prompt of some length")


def test_prompt_logprobs_come_where_no_token_can_be_drawn_after_the_prompt() -> None:
    logprobs = [TokenLogprob(token_id, -1.0) for token_id in b"bc"]
    seq = ScheduledSeq(1, 0, list(b"abc"), [0], prompt_targets=list(b"bc"))

    result = SeqResult.of_draws(seq, [Undrawn.NOTHING_ALLOWED], logprobs)

    assert result.error == Undrawn.NOTHING_ALLOWED.value
    assert result.prompt_logprobs == logprobs


def test_a_request_id_in_use_is_refused(make_driver: MakeDriver) -> None:
    driver = make_driver()
    driver.submit("abc", request_id="same")

    with pytest.raises(InvalidRequest, match="in use"):
        driver.submit("abc", request_id="same")
