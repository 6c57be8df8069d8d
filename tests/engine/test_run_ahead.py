"""Steps that are decided before the result of the one before is there: what they hold, and what is dropped of them."""

from __future__ import annotations

import operator
import random
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from brlite.engine.backend import Batch, ScheduledSeq
from brlite.engine.outputs import RequestOutput
from brlite.errors import EngineError
from brlite.sampling_params import PoolingParams, StructuredOutput
from tests.engine.conftest import Driver
from tests.fakes import EOS, FakeBackend, printable_token, reference_tokens, repeating_token


def ahead(**options: Any) -> Driver:
    return Driver(can_run_ahead=True, **options)


def reference_text(prompt: str, num_tokens: int) -> str:
    return bytes(reference_tokens(prompt.encode(), num_tokens)).decode()


def run_lengths(driver: Driver, batches: list[Batch]) -> list[int]:
    return [len(batch.seqs) for batch in batches]


def test_each_step_but_the_first_is_there_before_the_one_before_has_ended():
    driver = ahead()
    answers = [driver.submit(prompt, max_tokens=8) for prompt in ("one", "two", "three")]

    batches = driver.finish()

    assert [driver.text(answer) for answer in answers] == [reference_text(each, 8) for each in ("one", "two", "three")]
    assert run_lengths(driver, batches) == [3] * 8  # the last token is foreseen: no run too many
    assert driver.backend.num_launched_ahead == driver.engine.stats.steps_ahead == 7


def test_a_step_that_is_decided_ahead_names_the_token_that_is_not_drawn_yet():
    driver = ahead()
    driver.submit("hello", max_tokens=3, min_tokens=2, seed=7, temperature=1.0)

    first, second, third = (batch.seqs[0] for batch in driver.finish())

    assert (first.takes_last_draw, second.takes_last_draw, third.takes_last_draw) == (False, True, True)
    assert [(seq.start, len(seq.token_ids)) for seq in (first, second, third)] == [(0, 5), (5, 1), (6, 1)]
    assert [seq.sampling.position for seq in (first, second, third) if seq.sampling] == [0, 1, 2]
    assert [seq.sampling.banned_token_ids for seq in (first, second, third) if seq.sampling] == [(EOS,), (EOS,), ()]


def test_without_such_a_backend_no_step_is_decided_ahead():
    driver = Driver()
    driver.submit("hello", max_tokens=8)

    batches = driver.finish()

    assert driver.engine.stats.steps_ahead == 0
    assert not any(seq.takes_last_draw for batch in batches for seq in batch.seqs)


def test_what_follows_the_end_of_a_sequence_is_dropped_and_its_blocks_are_kept_that_long():
    expected = reference_text("hello", 12)
    driver = ahead(max_num_seqs=2)
    stopped = driver.submit("hello", max_tokens=12, stop=[expected[3:5]])
    other = driver.submit("other", max_tokens=12)
    num_blocks = []

    while driver.engine.has_work:
        driver.step()
        num_blocks.append(driver.engine.stats.num_used_blocks)

    assert driver.text(stopped) == expected[:3]
    assert driver.outputs[stopped].outputs[0].stop_reason == expected[3:5]
    assert driver.token_ids(stopped) == reference_tokens(b"hello", 5)
    assert driver.text(other) == reference_text("other", 12)
    assert [len(batch.seqs) for batch in driver.backend.batches] == [2] * 6 + [1] * 6  # five tokens, one run too many
    assert num_blocks[4] > num_blocks[5]  # not when it ended, but a step later


def test_the_end_of_a_sequence_leaves_its_blocks_in_the_prefix_cache():
    expected = reference_tokens(b"hello, you", 6)
    driver = ahead()
    driver.submit("hello, you", max_tokens=12, stop_token_ids=(expected[5],))
    driver.finish()

    again = driver.submit("hello, you there", max_tokens=6)
    batches = driver.finish()

    assert batches[0].seqs[0].start == 8
    assert driver.text(again) == reference_text("hello, you there", 6)


@pytest.mark.parametrize("num_steps", range(9))
def test_an_abort_at_any_boundary_ends_the_request_at_once_and_no_other(num_steps: int):
    driver = ahead(max_num_seqs=3)
    going = driver.submit("going", max_tokens=10)
    aborted = driver.submit("aborted", max_tokens=10, n=2)
    for _ in range(num_steps):
        driver.step()

    driver.begin()
    driver.engine.abort(aborted)
    driver.end()
    assert driver.outputs[aborted].finished
    driver.engine.check_integrity()
    driver.finish()

    assert driver.engine.stats.num_used_blocks == 0
    assert driver.text(going) == reference_text("going", 10)
    for output in driver.outputs[aborted].outputs:
        assert output.finish_reason == "abort"
    assert driver.token_ids(aborted) == reference_tokens(b"aborted", 10)[: len(driver.token_ids(aborted))]


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 1.1, "repeat_last_n": 3},
        {"bad_words": ["zz"]},
        {"structured": StructuredOutput(regex="[a-z]{6}")},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_all_wait_while_one_sequences_draw_depends_on_the_token_before_it(asked: dict[str, Any]):
    driver = ahead()
    plain = driver.submit("plain", max_tokens=12)
    driver.submit("bound", max_tokens=6, **asked)

    batches = driver.finish()

    ahead_of = [any(seq.takes_last_draw for seq in batch.seqs) for batch in batches]
    assert run_lengths(driver, batches) == [2] * 6 + [1] * 6
    assert ahead_of == [False] * 6 + [True] * 6  # the last of the six is foreseen, whatever it is
    assert driver.text(plain) == reference_text("plain", 12)


def test_penalties_count_the_token_that_is_not_drawn_yet_when_it_is():
    driver = ahead(next_token=repeating_token)
    driver.submit("abc", max_tokens=12, presence_penalty=0.5, repetition_penalty=1.1)  # the backend checks the counts

    batches = driver.finish()

    assert driver.engine.stats.steps_ahead == 11
    third = batches[2].seqs[0].sampling
    assert third is not None
    assert sum(array("i", third.output_counts)) == 1  # of two, the second is being drawn
    assert sum(array("i", third.counting(ord("b")).output_counts)) == 2
    assert len(third.counting(ord("z")).counted_token_ids) == len(third.counted_token_ids) + 4


def test_drafts_are_made_where_they_pay_and_steps_are_decided_ahead_where_they_do_not():
    options: dict[str, Any] = {
        "max_draft_tokens": 7,
        "next_token": repeating_token,
        "engine": {"max_draft_seqs": 1, "speculation": "on"},
    }
    alone, many = ahead(**options), ahead(**options)
    alone.submit("abcabcabcabcabc", max_tokens=40)
    for prompt in ("abcabcabcabcabc", "bcabcabcabcabc"):
        many.submit(prompt, max_tokens=40)

    alone.finish()
    many.finish()

    assert alone.engine.stats.accepted_tokens > 0
    assert 0 < alone.engine.stats.steps_ahead < len(alone.backend.batches) - 4
    assert many.engine.stats.draft_tokens == 0
    assert many.engine.stats.steps_ahead > 30
    assert many.token_ids("request-0") == alone.token_ids("request-0")


def test_a_step_with_drafts_is_not_followed_before_its_result_is_there():
    driver = ahead(max_draft_tokens=7, next_token=repeating_token, engine={"speculation": "on"}, budget=32)
    for prompt in ("abcabcabcabc", "bcabcabcab"):
        driver.submit(prompt, max_tokens=40)

    batches = driver.finish()

    has_drafts = [any(seq.num_draft_tokens for seq in batch.seqs) for batch in batches]
    is_ahead = [any(seq.takes_last_draw for seq in batch.seqs) for batch in batches]
    assert sum(has_drafts) > 3
    assert sum(is_ahead) > 3
    assert not any(map(operator.and_, has_drafts, is_ahead))
    assert not any(map(operator.and_, has_drafts, is_ahead[1:]))


def test_on_a_backend_that_runs_ahead_text_is_drafted_only_if_the_config_says_so():
    driver = ahead(max_draft_tokens=7, next_token=lambda context, seed: ord("a"))
    driver.submit("aaaaaaaa", max_tokens=20)

    driver.finish()

    assert not driver.engine.may_draft
    assert driver.engine.stats.draft_tokens == 0
    assert driver.engine.stats.steps_ahead == 19


def test_drafts_that_gain_less_than_the_device_would_wait_are_not_made():
    def drafted(wait_cost: float) -> int:
        driver = ahead(max_draft_tokens=1, next_token=lambda *_: ord("a"), engine={"speculation": "on"}, budget=32)
        assert driver.engine._scheduler.speculation.wait_cost is not None
        driver.engine._scheduler.speculation.wait_cost.observe = lambda *_, **more: None  # type: ignore[method-assign]
        driver.engine._scheduler.speculation.wait_cost.cost = wait_cost
        driver.submit("aaaaaaaa", max_tokens=30)
        driver.finish()
        return driver.engine.stats.draft_tokens

    assert drafted(0.5) > 5
    assert drafted(1.5) == 0  # a step of two tokens at most


@pytest.mark.parametrize("next_token", [printable_token, repeating_token])
def test_a_draft_model_that_does_not_pay_lets_steps_be_decided_ahead(next_token: Callable[..., int]):
    draft = FakeBackend(next_token=next_token, num_blocks=64, max_model_len=64)
    driver = ahead(max_draft_tokens=7, draft_backend=draft, draft_seconds=0.05, num_blocks=128, max_model_len=400)

    driver.submit("hello", max_tokens=50)
    driver.submit("you", max_tokens=50)
    driver.finish()

    assert [driver.text(f"request-{n}") for n in (0, 1)] == [reference_text(each, 50) for each in ("hello", "you")]
    stats = driver.engine.stats
    if next_token is printable_token:  # the served model's own
        assert stats.accepted_tokens == stats.draft_tokens > 50
    else:
        assert stats.steps_ahead > 25


def test_a_failed_step_ends_its_requests_and_those_of_the_step_behind_it_go_on():
    def fault(seq: ScheduledSeq) -> None:
        if seq.start == len("first"):
            raise RuntimeError("broken kernel")

    driver = ahead(fault=fault)
    first = driver.submit("first", max_tokens=8)
    driver.step()  # the prompt is computed, and the step that will fail is under way
    second = driver.submit("other one", max_tokens=8)
    driver.begin()
    driver.finish()

    assert first in driver.errors
    assert {len(batch.seqs) for batch in driver.backend.batches} == {1, 2}  # one run was dropped
    assert driver.text(second) == reference_text("other one", 8)
    assert driver.engine.stats.num_used_blocks == 0


def test_a_fault_of_one_sequence_is_its_own_and_its_blocks_are_not_found_again():
    prompt = "a prompt of some blocks"
    faults = ["not finite"]

    def fault(seq: ScheduledSeq) -> str | None:
        return faults.pop() if faults and seq.start == len(prompt) + 2 else None

    driver = ahead(fault=fault, budget=64)
    faulty = driver.submit(prompt, max_tokens=12)
    other = driver.submit("other", max_tokens=12)
    driver.finish()
    again = driver.submit(prompt, max_tokens=12)
    batch = driver.step()
    driver.finish()

    assert faulty in driver.errors
    assert driver.text(other) == reference_text("other", 12)
    assert batch is not None
    assert batch.seqs[0].start == 0
    assert driver.text(again) == reference_text(prompt, 12)


def test_a_request_id_may_be_used_again_while_a_run_of_the_old_one_is_under_way():
    expected = reference_tokens(b"old", 3)
    driver = ahead()
    driver.submit("old", request_id="same", max_tokens=9, stop_token_ids=(expected[2],))
    while not driver.finished:
        driver.step()
    assert driver.outputs.pop("same").outputs[0].token_ids == expected
    driver.submit("new", request_id="same", max_tokens=5)

    driver.finish()

    assert driver.token_ids("same") == reference_tokens(b"new", 5)
    assert driver.finished == ["same", "same"]


def test_where_blocks_are_short_the_step_waits_and_a_sequence_is_preempted_as_ever():
    driver = ahead(num_blocks=9, max_model_len=36, max_num_seqs=3)
    answers = {prompt: driver.submit(prompt, max_tokens=18) for prompt in ("a", "bc", "def")}

    driver.finish()

    assert driver.engine.stats.preemptions > 0
    assert driver.engine.stats.steps_ahead > 0
    for prompt, answer in answers.items():
        assert driver.text(answer) == reference_text(prompt, 18)


def test_a_tenant_without_a_place_gets_one_though_steps_are_decided_ahead():
    driver = ahead(max_num_seqs=2)
    for prompt in ("one", "two"):
        driver.submit(prompt, max_tokens=30, tenant="a")
    driver.step()

    newcomer = driver.submit("three", max_tokens=2, tenant="b")
    for _ in range(4):
        driver.step()

    assert driver.finished == [newcomer]


def test_a_mean_over_a_prompts_chunks_waits_for_each_and_the_last_state_does_not():
    pooled: dict[str, list[RequestOutput]] = {}
    for pooling in ("mean", "last"):
        for make in (Driver, ahead):
            driver = make(budget=8)
            answer = driver.submit("a prompt of four chunks of 8", pooling=PoolingParams(pooling=pooling))
            driver.finish()
            pooled.setdefault(pooling, []).append(driver.outputs[answer])
            is_ahead = make is ahead and pooling == "last"
            assert driver.engine.stats.steps_ahead == (3 if is_ahead else 0)

    for plain, decided_ahead in pooled.values():
        assert plain.embedding == decided_ahead.embedding


def test_completions_of_one_prompt_join_when_it_is_computed():
    driver = ahead(max_num_seqs=4)
    plain = Driver(max_num_seqs=4)
    for each in (driver, plain):
        each.submit("a prompt", n=4, temperature=1.0, seed=5, max_tokens=7, logprobs=2, prompt_logprobs=1)
        each.finish()

    assert by_index(driver.outputs["request-0"]) == by_index(plain.outputs["request-0"])
    assert driver.outputs["request-0"].prompt_logprobs == plain.outputs["request-0"].prompt_logprobs


def test_ending_everything_leaves_no_block_with_steps_that_never_end():
    driver = ahead()
    for prompt in ("one", "two"):
        driver.submit(prompt, max_tokens=20)
    driver.step()
    driver.begin()

    driver.engine.end_all(partial(EngineError, "over"))

    driver.engine.check_integrity()
    assert driver.engine.stats.num_used_blocks == 0
    assert set(driver.errors) == {"request-0", "request-1"}
    assert driver.engine.schedule() is None


def test_a_step_takes_the_time_from_the_end_of_the_one_before(make_driver: Callable[..., Driver]):
    driver = make_driver(can_run_ahead=True, step_seconds=lambda batch: 2.0)
    driver.submit("hello", max_tokens=5)

    driver.finish()

    assert driver.engine.stats.step_time.total == 2.0 * 5


def test_at_most_one_step_is_decided_ahead():
    driver = ahead()
    with pytest.raises(EngineError, match="0 steps under way"):
        driver.engine.schedule_ahead()
    driver.submit("hello", max_tokens=9)
    driver.begin()

    with pytest.raises(EngineError, match="2 steps under way"):
        driver.engine.schedule_ahead()
    with pytest.raises(EngineError, match="schedule was called before"):
        driver.engine.schedule()


@pytest.mark.parametrize("seed", range(12))
def test_any_mix_of_requests_gets_the_same_whether_steps_are_decided_ahead_or_not(seed: int):
    outputs = []
    for can_run_ahead in (False, True):
        choose = random.Random(seed)
        driver = Driver(
            budget=choose.choice([5, 9, 32]),
            num_blocks=choose.choice([14, 40]),
            max_num_seqs=choose.choice([2, 4]),
            max_model_len=48,
            max_draft_tokens=choose.choice([0, 0, 4]),
            next_token=repeating_token,
            engine={"max_draft_seqs": 1, "speculation": "on"},
            can_run_ahead=can_run_ahead,
        )
        for number in range(16):
            submit_some(driver, choose, number)
            for _ in range(choose.randrange(4)):
                driver.step()
        driver.finish()
        assert (driver.engine.stats.steps_ahead > 0) == can_run_ahead
        assert not driver.errors
        outputs.append({request_id: by_index(output) for request_id, output in driver.outputs.items()})

    assert outputs[0] == outputs[1]


def submit_some(driver: Driver, choose: random.Random, number: int) -> None:
    """A request of any kind; of five, three have nothing that the next step must wait for."""
    more: dict[str, Any] = choose.choice(
        [
            *[{}, {"stop": ["ab", "cc"]}, {"min_tokens": 4, "stop_token_ids": (97,)}, {"logprobs": 1}],
            *[{"n": 3}, {"prompt_logprobs": 2}, {"presence_penalty": 1.0}, {"bad_words": ["b"]}],
            {"structured": StructuredOutput(regex="[ab]{2,9}")},
        ]
    )
    prompt = choose.choice(["", "abcab"]) + "".join(choose.choices("abc", k=choose.randint(1, 12)))
    driver.submit(
        prompt,
        max_tokens=choose.randint(more.get("min_tokens", 1), 14),
        temperature=1.0,
        seed=number,
        tenant=choose.choice(["", "other"]),
        **more,
    )


def by_index(output: RequestOutput) -> list[Any]:
    return sorted(output.outputs, key=lambda completion: completion.index)
