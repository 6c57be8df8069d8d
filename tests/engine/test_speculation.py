"""Speculation changes how many steps a text takes, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brlite.engine.backend import CPU_ROWS, Batch
from brlite.engine.outputs import RequestOutput
from brlite.engine.stats import EngineStats
from tests.engine.conftest import PATIENT, Driver, MakeDriver
from tests.fakes import BLOCK_SIZE, EOS, printable_token, reference_tokens, repeating_token

LONG = {"num_blocks": 256, "max_model_len": 1024, "max_draft_tokens": 7}


def stopping_token(context: Sequence[int], seed: int) -> int:
    return EOS if sum(context) % 29 == 0 else repeating_token(context, seed)


def always_a(context: Sequence[int], seed: int) -> int:
    return ord("a")


def num_drafted(batches: list[Batch]) -> int:
    return sum(seq.num_draft_tokens for batch in batches for seq in batch.seqs)


requests = st.fixed_dictionaries(
    {
        "prompt": st.builds(
            lambda head, tail: head * 4 + tail,
            st.sampled_from(["", "ab", "abc"]),
            st.text("abc", min_size=1, max_size=6),
        ),
        "max_tokens": st.integers(1, 32),
        "n": st.integers(1, 3),
        "seed": st.integers(0, 5),
        "temperature": st.sampled_from([0.0, 1.0]),
    },
    optional={
        "stop": st.lists(st.text("abc", min_size=1, max_size=4), max_size=2),
        "stop_token_ids": st.lists(st.sampled_from([ord("a"), ord("c"), EOS]), max_size=1),
        "include_stop_str_in_output": st.booleans(),
        "ignore_eos": st.booleans(),
        "min_tokens": st.integers(0, 1),
        "logprobs": st.integers(0, 2),
        "prompt_logprobs": st.integers(0, 1),
        "presence_penalty": st.just(0.5),
    },
)


def engine_options(num_blocks: int, max_num_seqs: int, budget: int) -> dict[str, Any]:
    """Of an engine whose answers are compared with and without drafts."""
    return {
        "budget": budget,
        "limits": PATIENT,
        "num_blocks": num_blocks,
        "max_num_seqs": max_num_seqs,
        "max_model_len": 64,
        "max_draft_tokens": 16,
        "next_token": stopping_token,
    }


def run(driver: Driver, asked: list[tuple[int, dict[str, Any]]]) -> dict[str, RequestOutput]:
    for num_steps, request in asked:
        driver.submit(**request)
        for _ in range(num_steps):
            driver.step()
    driver.finish()
    assert not driver.errors
    return driver.outputs


def without_timing(output: RequestOutput) -> tuple[Any, ...]:
    """All but what was found in the cache, which depends on who came first."""
    return output.prompt_logprobs, output.finished, sorted(output.outputs, key=lambda completion: completion.index)


@settings(max_examples=100, deadline=None)
@given(
    asked=st.lists(st.tuples(st.integers(0, 6), requests), min_size=2, max_size=6),
    num_blocks=st.sampled_from([8, 11, 14, 64]),
    max_num_seqs=st.integers(2, 4),
    budget=st.sampled_from([5, 16]),
    max_draft_tokens=st.sampled_from([1, 3, 16]),
)
def test_outputs_are_the_same_with_and_without(
    asked: list[tuple[int, dict[str, Any]]], num_blocks: int, max_num_seqs: int, budget: int, max_draft_tokens: int
) -> None:
    options = engine_options(num_blocks, max_num_seqs, budget)
    off = Driver(engine={"speculation": "off"}, **options)
    on = Driver(engine={"max_draft_tokens": max_draft_tokens}, **options)

    expected, found = run(off, asked), run(on, asked)

    assert off.engine.stats.drafts == 0
    assert found.keys() == expected.keys()
    for request_id, output in found.items():
        assert without_timing(output) == without_timing(expected[request_id])


def test_a_text_that_repeats_itself_takes_far_fewer_steps(make_driver: MakeDriver) -> None:
    driver = make_driver(next_token=always_a, **LONG)

    request_id = driver.submit("hello", max_tokens=256)
    batches = driver.finish()

    assert driver.token_ids(request_id) == [ord("a")] * 256
    assert len(batches) < 256 / 5


def test_texts_beside_one_that_repeats_itself_take_hardly_longer(make_driver: MakeDriver) -> None:
    def next_token(context: Sequence[int], seed: int) -> int:
        return ord("a") if context[0] == ord("a") else printable_token(context, seed)

    def ends(speculation: str) -> dict[str, float]:
        driver = make_driver(
            next_token=next_token,
            step_seconds=lambda batch: CPU_ROWS.cost(batch.num_tokens),
            engine={"speculation": speculation},
            budget=64,
            **LONG,
        )
        for text in ("a", "one", "two", "three"):
            driver.submit(text, max_tokens=100)
        found = dict[str, float]()
        while driver.step() is not None:
            found |= dict.fromkeys(set(driver.finished) - found.keys(), driver.now)
        return found

    plain, drafted = ends("off"), ends("auto")

    assert drafted["request-0"] < 0.97 * plain["request-0"]
    assert all(drafted[request_id] <= plain[request_id] / 0.97 for request_id in plain)


def test_a_search_beside_a_text_that_repeats_itself_takes_hardly_longer(make_driver: MakeDriver) -> None:
    """Its beams take turns in one place, and go on in new sequences: what drafts have cost them must go on, too."""

    def end(speculation: str) -> float:
        driver = make_driver(
            next_token=lambda context, seed: ord("a") if context[0] == ord("a") else printable_token(context, seed),
            step_seconds=lambda batch: CPU_ROWS.cost(batch.num_tokens),
            engine={"speculation": speculation},
            max_num_seqs=2,
            budget=64,
            **LONG,
        )
        search = driver.submit("one", use_beam_search=True, best_of=3, max_tokens=60)
        driver.submit("aaaaaaaaa", max_tokens=900)
        while search not in driver.finished:
            driver.step()
        assert (driver.engine.stats.accepted_tokens > 0) == (speculation == "auto")
        return driver.now

    assert end("auto") <= end("off") / 0.97


def test_a_text_that_does_not_repeat_itself_costs_next_to_nothing(make_driver: MakeDriver) -> None:
    driver = make_driver(next_token=printable_token, **LONG)

    driver.submit("hello", max_tokens=512)
    batches = driver.finish()

    assert num_drafted(batches) * CPU_ROWS.cheap < 0.01 * len(batches)


def test_drafts_that_are_wrong_again_and_again_are_given_up(make_driver: MakeDriver) -> None:
    """The same two words come back and back, and each time something else follows."""
    driver = make_driver(next_token=lambda context, seed: [1, 2, 3 + len(context) // 3][len(context) % 3], **LONG)

    driver.submit([1, 2, 3], max_tokens=500)
    batches = driver.finish()

    assert 0 < num_drafted(batches) < 10
    assert driver.engine.stats.accepted_tokens == 0


def test_draft_tokens_and_how_many_were_right_are_counted(make_driver: MakeDriver) -> None:
    driver = make_driver(next_token=repeating_token, **LONG)

    driver.submit("abc", max_tokens=200)
    batches = driver.finish()

    stats: EngineStats = driver.engine.stats
    assert stats.draft_tokens == num_drafted(batches)
    assert stats.drafts == sum(batch.seqs[0].num_draft_tokens > 0 for batch in batches)
    assert stats.accepted_tokens == 200 - len(batches)
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    by_position = [stats.accepted_by_position[position] for position in range(len(stats.accepted_by_position))]
    assert sum(by_position) == stats.accepted_tokens
    assert by_position == sorted(by_position, reverse=True)
    assert stats.generation_tokens == 200


def test_tokens_of_one_step_share_its_time(make_driver: MakeDriver) -> None:
    driver = make_driver(next_token=always_a, **LONG)

    driver.submit("hello", max_tokens=100)
    batches = driver.finish()

    latency = driver.engine.stats.inter_token_latency
    assert sum(latency.counts) == 99
    assert latency.total == pytest.approx(len(batches) - 1)  # the clock goes one second a step


@pytest.mark.parametrize("length", range(28, 36))
def test_what_comes_after_a_stop_is_dropped(make_driver: MakeDriver, length: int) -> None:
    driver = make_driver(next_token=always_a, **LONG)

    request_id = driver.submit("hello", stop=["a" * length], max_tokens=100)
    driver.finish()

    assert driver.text(request_id) == ""
    assert len(driver.token_ids(request_id)) == length
    assert driver.engine.stats.generation_tokens == length


@pytest.mark.parametrize("length", range(28, 36))
def test_a_text_that_ends_amid_right_draft_tokens_is_cached_as_far_as_any_other(
    make_driver: MakeDriver, length: int
) -> None:
    driver = make_driver(next_token=always_a, budget=64, **LONG)
    driver.submit("hello", stop=["a" * length], max_tokens=100)
    driver.finish()

    again = driver.submit("hello" + "a" * length, max_tokens=1)
    driver.finish()

    num_computed = len("hello") + length - 1
    assert driver.outputs[again].num_cached_tokens == num_computed // BLOCK_SIZE * BLOCK_SIZE


def test_what_a_drafted_text_left_in_the_cache_is_found_and_right(make_driver: MakeDriver) -> None:
    driver = make_driver(next_token=repeating_token, budget=64, **LONG)
    first = driver.submit("abc", max_tokens=61)
    driver.finish()
    prompt = [*b"abc", *driver.token_ids(first)]

    second = driver.submit(prompt, max_tokens=30)
    driver.finish()

    assert driver.engine.stats.accepted_tokens < driver.engine.stats.draft_tokens
    assert driver.outputs[second].num_cached_tokens == 60  # all but the last block, whose last token was not computed
    assert driver.token_ids(second) == reference_tokens(prompt, 30, next_token=repeating_token)


@pytest.mark.parametrize(
    "params",
    [{"presence_penalty": 0.5}, {"repetition_penalty": 1.1}, {"min_tokens": 40}, {"bad_words": ["bcd"]}],
    ids=lambda params: next(iter(params)),
)
def test_a_sequence_whose_draws_depend_on_each_other_has_no_drafts(
    make_driver: MakeDriver, params: dict[str, Any]
) -> None:
    driver = make_driver(next_token=always_a, **LONG)

    driver.submit("hello", max_tokens=40, **params)

    assert num_drafted(driver.finish()) == 0


def test_drafts_begin_where_min_tokens_ends(make_driver: MakeDriver) -> None:
    driver = make_driver(next_token=always_a, **LONG)

    driver.submit("hello", max_tokens=60, min_tokens=40)
    batches = driver.finish()

    assert num_drafted(batches[:40]) == 0
    assert num_drafted(batches[40:]) > 0


@pytest.mark.parametrize(
    ("backend", "engine"),
    [({"max_draft_tokens": 0}, {}), ({"max_draft_tokens": 7}, {"speculation": "off"})],
    ids=["the backend cannot verify", "switched off"],
)
def test_nothing_is_drafted_where_it_cannot_or_must_not(
    make_driver: MakeDriver, backend: dict[str, Any], engine: dict[str, Any]
) -> None:
    driver = make_driver(next_token=always_a, engine=engine, **backend)

    driver.submit("hello", max_tokens=30)

    assert num_drafted(driver.finish()) == 0


@pytest.mark.parametrize(("of_backend", "of_config", "expected"), [(3, 7, 3), (7, 2, 2), (8, 8, 8)])
def test_a_draft_is_as_long_as_backend_and_config_allow(
    make_driver: MakeDriver, of_backend: int, of_config: int, expected: int
) -> None:
    driver = make_driver(
        **{**LONG, "max_draft_tokens": of_backend},
        budget=64,
        engine={"max_draft_tokens": of_config},
        next_token=always_a,
    )

    driver.submit("hello", max_tokens=300)

    assert max(seq.num_draft_tokens for batch in driver.finish() for seq in batch.seqs) == expected


def test_while_many_run_there_are_no_drafts(make_driver: MakeDriver) -> None:
    driver = make_driver(next_token=always_a, engine={"max_draft_seqs": 1}, max_num_seqs=2, **LONG)
    driver.submit("hello", max_tokens=20)
    driver.submit("world", max_tokens=60)

    batches = driver.finish()

    assert num_drafted([batch for batch in batches if len(batch.seqs) == 2]) == 0
    assert num_drafted([batch for batch in batches if len(batch.seqs) == 1]) > 0


def test_drafts_keep_to_the_budget_of_tokens(make_driver: MakeDriver) -> None:
    driver = make_driver(next_token=always_a, budget=6, **LONG)

    for prompt in ("hello", "world"):
        driver.submit(prompt, max_tokens=60)
    batches = driver.finish()

    assert num_drafted([batch for batch in batches if len(batch.seqs) == 2]) > 0
    assert max(batch.num_tokens for batch in batches) == 6


def test_a_prompt_has_no_drafts(make_driver: MakeDriver) -> None:
    driver = make_driver(next_token=always_a, budget=64, **LONG)
    driver.submit("a" * 41, max_tokens=1)
    driver.finish()

    driver.submit("a" * 41, max_tokens=20)  # but for its last token it is cached
    batches = driver.finish()

    assert num_drafted(batches[:1]) == 0
    assert num_drafted(batches) > 0


def test_drafts_end_where_max_tokens_does(make_driver: MakeDriver) -> None:
    driver = make_driver(next_token=always_a, num_blocks=16, max_model_len=64, max_draft_tokens=16)

    driver.submit("hello" * 6, max_tokens=32)
    batches = driver.finish()

    assert max(seq.start + len(seq.token_ids) for batch in batches for seq in batch.seqs) == 30 + 31


@pytest.mark.parametrize("num_blocks", [9, 11, 13])
def test_a_draft_leaves_each_sequence_a_block_for_its_next_token(make_driver: MakeDriver, num_blocks: int) -> None:
    driver = make_driver(
        next_token=always_a, num_blocks=num_blocks, max_num_seqs=2, max_model_len=32, max_draft_tokens=16
    )
    for _ in range(2):
        driver.submit("aaaaaaa", max_tokens=20)
    num_reaching = 0

    while (batch := driver.engine.schedule()) is not None:
        for seq in batch.seqs:
            num_real_blocks = -(-(seq.start + len(seq.token_ids) - seq.num_draft_tokens) // BLOCK_SIZE)
            if seq.num_draft_tokens and len(seq.block_table) > num_real_blocks:
                num_reaching += 1
                assert num_blocks - driver.engine.stats.num_used_blocks >= len(batch.seqs)
        driver.engine.update(driver.backend.execute(batch))

    assert num_reaching > 0


def test_a_draft_is_shortened_where_blocks_are_scarce(make_driver: MakeDriver) -> None:
    driver = make_driver(next_token=always_a, num_blocks=5, max_model_len=20, max_draft_tokens=16)

    request_id = driver.submit("aaaaaaaa", max_tokens=10)
    batches = driver.finish()

    assert driver.token_ids(request_id) == [ord("a")] * 10
    assert num_drafted(batches) > 0
    assert driver.engine.stats.preemptions == 0
