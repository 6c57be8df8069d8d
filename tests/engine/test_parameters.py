"""What sampling parameters make of a sequence: its end, banned tokens, penalties, logprobs of the prompt."""

from __future__ import annotations

from array import array
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brlite.engine.backend import ScheduledSeq, SeqResult, Undrawn
from brlite.engine.outputs import TokenLogprob
from brlite.engine.request import Request, TokenCounts
from brlite.errors import EngineError
from brlite.sampling_params import SamplingParams
from tests.engine.conftest import MakeDriver
from tests.fakes import EOS, reference_tokens


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
