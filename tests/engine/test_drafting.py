"""Drafts from a sequence's own words, and when they pay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brlite.engine.backend import CARD_ROWS, CPU_ROWS, RowCosts
from brlite.engine.drafting import (
    INITIAL_ACCEPTANCE,
    INITIAL_WAIT_COST,
    MAX_NEW_TOKENS,
    NgramDrafter,
    RowTimes,
    StepForecast,
    WaitCost,
)


def draft(text: str, num_tokens: int = 4) -> str | None:
    token_ids = list(text.encode())
    drafter = NgramDrafter(num_prompt_tokens=len(token_ids))
    return bytes(drafter.draft(token_ids, num_tokens)).decode() if drafter.follow(token_ids) else None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three, one t", "wo t"),
        ("abcd..bcX..abc", "d..b"),  # three tokens that agree say more than two
        ("abX abY ab", "Y ab"),  # of equal places the latest
        ("abcdef", None),
        ("ab", None),
        ("", None),
    ],
)
def test_what_followed_the_last_words_before_is_drafted(text: str, expected: str | None) -> None:
    assert draft(text) == expected


def test_a_draft_that_reaches_the_end_goes_round() -> None:
    assert draft("xyxyx", 7) == "yxyxyxy"


def test_a_copy_stays_with_its_source_where_the_words_are_ambiguous() -> None:
    source = "the red cat sat by the red dog and the red fox;"

    token_ids = list((source + "the red cat sat by the red ").encode())
    drafter = NgramDrafter(num_prompt_tokens=len(source))

    assert drafter.follow(token_ids)
    assert bytes(drafter.draft(token_ids, 3)) == b"dog"


@given(chunks=st.lists(st.text("ab", max_size=5), max_size=12))
def test_tokens_taken_in_one_by_one_or_together_give_the_same_drafts(chunks: list[str]) -> None:
    whole = list("".join(chunks).encode())
    together, apart, token_ids = NgramDrafter(3), NgramDrafter(3), list[int]()

    for chunk in chunks:
        token_ids += chunk.encode()
        apart.follow(token_ids)

    assert together.follow(whole) == apart.follow(whole)
    assert together.acceptance == apart.acceptance
    if together.follow(whole):
        assert together.draft(whole, 5) == apart.draft(whole, 5)


def test_a_long_prompt_is_taken_in_a_part_at_a_time() -> None:
    token_ids = [1, 2, 3, 4] * MAX_NEW_TOKENS
    drafter = NgramDrafter(num_prompt_tokens=len(token_ids))

    answers = [drafter.follow(token_ids) for _ in range(4)]

    assert answers == [False, False, False, True]


def test_acceptance_is_learnt_from_what_was_drawn_without_a_draft() -> None:
    prompt = list(range(30))
    copying, drafter = NgramDrafter(len(prompt)), NgramDrafter(len(prompt))

    copying.follow(prompt + prompt)
    drafter.follow([*prompt, 0, 1, 99, 0, 1, 98, 0, 1, 97])

    assert copying.acceptance > 0.95
    assert drafter.acceptance < INITIAL_ACCEPTANCE


def test_a_prompt_that_repeats_itself_promises_nothing_of_the_answer() -> None:
    prompt = [1, 2] * 50
    drafter = NgramDrafter(len(prompt))

    drafter.follow([*prompt, 7])

    assert drafter.acceptance < INITIAL_ACCEPTANCE


def test_more_certain_drafts_are_longer_and_hopeless_ones_are_not_made() -> None:
    lengths = [
        StepForecast(1, CPU_ROWS).add_draft_tokens(acceptance, 7) for acceptance in (0.0, 0.05, 0.2, 0.6, 0.9, 1.0)
    ]

    assert lengths == sorted(lengths)
    assert lengths[:2] == [0, 0]
    assert 1 <= lengths[2] < lengths[4] < lengths[5] == 7


def test_fewer_drafts_pay_the_more_rows_a_step_has() -> None:
    lengths = [StepForecast(num_rows, CPU_ROWS).add_draft_tokens(0.8, 16) for num_rows in (1, 2, 4, 8, 128)]

    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 0


def test_drafts_of_one_sequence_leave_less_to_those_of_the_next() -> None:
    forecast = StepForecast(2, CPU_ROWS)

    lengths = [forecast.add_draft_tokens(0.6, 7) for _ in range(2)]

    assert lengths[0] > lengths[1]


STEEP = RowCosts(4, 0.3, 0.4)


@pytest.fixture
def measured() -> RowTimes:
    """What is known after many steps on a machine whose rows have `STEEP` costs."""
    times = RowTimes(CPU_ROWS)
    for _ in range(300):
        for num_rows in (1, 2, 8):
            times.observe(num_rows, 0.010 * STEEP.cost(num_rows), has_drafts=num_rows > 1)
    return times


def test_the_cost_of_rows_is_measured(measured: RowTimes) -> None:
    assert measured.costs.cheap == pytest.approx(STEEP.cheap, abs=0.01)
    assert measured.costs.other == pytest.approx(STEEP.other, abs=0.01)

    measured.observe(2, 60.0, has_drafts=True)  # the machine slept

    assert measured.costs.cheap < 1.2 * STEEP.cheap


def test_a_cost_that_ended_drafts_is_forgotten(measured: RowTimes) -> None:
    for _ in range(3000):
        measured.observe(1, 0.010, has_drafts=False)

    assert measured.costs.other < 1.1 * CPU_ROWS.other


@pytest.mark.parametrize("num_tokens", [24, 64, 500])
def test_a_text_that_deceives_every_draft_takes_hardly_longer(measured: RowTimes, num_tokens: int) -> None:
    """Each token is what n-grams say, unless that is drafted: then it is another one."""
    prompt = list(range(8))
    token_ids, taken = prompt * 2, 0.0
    drafter, oracle = NgramDrafter(len(prompt)), NgramDrafter(len(prompt))

    for number in range(num_tokens):
        expected = oracle.draft(token_ids, 1) if oracle.follow(token_ids) else prompt[:1]
        is_expected = drafter.follow(token_ids)
        draft = StepForecast(1, measured.costs).add_ngrams(drafter, token_ids, 7) if is_expected else []
        token_ids += [100 + number] if draft else expected
        taken += STEEP.cost(1 + len(draft))

    assert num_tokens < taken < num_tokens / 0.97


def test_the_wait_between_two_steps_is_measured_against_steps_that_were_launched_ahead() -> None:
    wait = WaitCost(CARD_ROWS)
    assert wait.cost == INITIAL_WAIT_COST
    for _ in range(60):
        wait.observe(1, 0.010, is_ahead=True)
        wait.observe(9, 0.010 * CARD_ROWS.cost(9) + 0.002, is_ahead=False)

    assert wait.cost == pytest.approx(0.2, abs=0.01)
    wait.observe(1, 60.0, is_ahead=False)  # the machine slept
    assert wait.cost < 0.7


def test_drafts_gain_only_if_they_are_worth_the_wait() -> None:
    forecast = StepForecast(1, CARD_ROWS)
    assert not forecast.gains(0.0)  # none yet

    forecast.add_draft_tokens(0.5, 3)  # one token more, nearly

    assert forecast.gains(0.5)
    assert not forecast.gains(1.0)
