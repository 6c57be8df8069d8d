"""Drafts from a sequence's own words, and when they pay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brlite.engine.backend import CARD_ROWS, CPU_ROWS
from brlite.engine.drafting import (
    INITIAL_ACCEPTANCE,
    INITIAL_WAIT_COST,
    MAX_NEW_TOKENS,
    DraftBudget,
    DraftCandidate,
    NgramDrafter,
    RowTimes,
    WaitCost,
    charge_drafts,
    choose_drafts,
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


PLENTY = 100.0


def lengths(num_seqs: int, *acceptances: float, ahead: float = PLENTY, limit: int = 7, **fields: float) -> list[int]:
    """The lengths of drafts in a step of so many sequences, of which the first ones may have a draft."""
    credit = fields.pop("credit", PLENTY)
    candidates = [DraftCandidate(place, each, limit, credit, **fields) for place, each in enumerate(acceptances)]
    choice = choose_drafts(num_seqs, RowTimes(CPU_ROWS).cost, candidates, [ahead] * num_seqs)
    return [choice.num_draft_tokens.get(position, 0) for position in range(len(acceptances))]


def test_more_certain_drafts_are_longer_and_hopeless_ones_are_not_made() -> None:
    found = [lengths(1, acceptance)[0] for acceptance in (0.0, 0.05, 0.2, 0.6, 0.9, 1.0)]

    assert found == sorted(found)
    assert found[:2] == [0, 0]
    assert 1 <= found[2] < found[4] < found[5] == 7


def test_fewer_drafts_pay_the_more_rows_a_step_has() -> None:
    found = [lengths(num_seqs, 0.8, limit=16)[0] for num_seqs in (1, 2, 4, 8, 128)]

    assert found == sorted(found, reverse=True)
    assert found[-1] == 0


def test_the_surest_draft_tokens_come_first_whatever_the_order_of_their_sequences() -> None:
    assert lengths(2, 0.5, 0.95) == lengths(2, 0.95, 0.5)[::-1]
    assert lengths(2, 0.5, 0.95)[0] < lengths(2, 0.5, 0.95)[1]


def test_a_dear_row_is_taken_for_the_cheap_ones_behind_it() -> None:
    def cost_of(num_rows: int) -> float:
        return 1.0 if num_rows == 1 else 1.9  # a tile of eight rows

    candidate = DraftCandidate(0, 0.9, 7, PLENTY)

    assert choose_drafts(1, cost_of, [candidate], [PLENTY]).num_draft_tokens == {0: 7}
    assert not choose_drafts(1, cost_of, [candidate._replace(limit=1)], [PLENTY]).num_draft_tokens


def test_a_draft_costs_its_sequence_no_more_than_its_credit() -> None:
    assert lengths(1, 1.0, credit=0.0) == [0]
    assert lengths(1, 1.0, credit=0.2) == [2]


def test_drafts_cost_other_sequences_no_more_than_they_can_bear() -> None:
    assert lengths(2, 1.0, ahead=0.0) == [0]
    assert lengths(2, 1.0, ahead=0.1) == [1]
    assert min(lengths(2, 1.0, 1.0, ahead=0.0)) > 0, "each gains more than the other's draft costs it"


def test_steps_of_a_draft_model_are_shared() -> None:
    candidates = [DraftCandidate(place, 0.8, 7, PLENTY, draft_cost=0.3) for place in range(4)]

    assert not choose_drafts(4, CARD_ROWS.cost, candidates[:1], [PLENTY] * 4).num_draft_tokens
    assert choose_drafts(4, CARD_ROWS.cost, candidates, [PLENTY] * 4).num_draft_tokens.keys() == {0, 1, 2, 3}


@given(
    acceptances=st.lists(st.floats(0, 1), max_size=4),
    credit=st.floats(-1, 3),
    ahead=st.lists(st.floats(-1, 3), min_size=4, max_size=4),
    draft_cost=st.sampled_from([0.0, 0.3]),
)
def test_no_sequence_is_expected_to_lose_more_than_it_can_bear(
    acceptances: list[float], credit: float, ahead: list[float], draft_cost: float
) -> None:
    candidates = [DraftCandidate(place, each, 7, credit, 1.0, draft_cost) for place, each in enumerate(acceptances)]

    choice = choose_drafts(4, RowTimes(CPU_ROWS).cost, candidates, ahead)

    for position, most in enumerate(ahead):
        num = choice.num_draft_tokens.get(position, 0)
        expected = sum(acceptances[position] ** n for n in range(1, num + 1)) if num else 0.0
        assert choice.extension <= max(0.0, most + expected) + 1e-9
    if choice.num_draft_tokens:
        assert choice.gain > 1


def steep(num_rows: int) -> float:
    """With jumps, and dearer than expected."""
    return 1.0 + 0.3 * (num_rows - 1) + 0.5 * (num_rows > 6)


@pytest.fixture
def measured() -> RowTimes:
    """What is known after many steps on a machine whose rows have `steep` costs."""
    times = RowTimes(CPU_ROWS)
    for _ in range(300):
        for num_rows in (1, 2, 6, 8):
            times.observe(num_rows, 0.010 * steep(num_rows), has_drafts=num_rows > 1)
    return times


def test_the_cost_of_rows_is_measured(measured: RowTimes) -> None:
    for num_rows in (2, 6, 8):
        assert measured.cost(num_rows) == pytest.approx(steep(num_rows), rel=0.02)
    assert measured.cost(7) - measured.cost(6) < 0.3, "not seen: as its nearest"
    assert measured.cost(9) > 1.5 * CPU_ROWS.cost(9)

    measured.observe(2, 60.0, has_drafts=True)  # the machine slept

    assert measured.cost(2) < 1.1 * steep(2)


def test_few_steps_show_that_rows_are_dear() -> None:
    times = RowTimes(CPU_ROWS)

    for _ in range(4):
        times.observe(1, 0.010, has_drafts=False)
        times.observe(8, 0.035, has_drafts=True)

    assert times.cost(8) > 3.0


def test_outliers_hardly_move_the_cost_of_rows(measured: RowTimes) -> None:
    for number in range(300):
        for num_rows in (1, 4):
            factor = 2.0 if number % 10 == num_rows else 1.0
            measured.observe(num_rows, 0.010 * steep(num_rows) * factor, has_drafts=num_rows > 1)

    assert measured.cost(4) / measured.cost(1) == pytest.approx(steep(4), rel=0.04)


def test_a_cost_that_ended_drafts_is_forgotten(measured: RowTimes) -> None:
    for _ in range(3000):
        measured.observe(1, 0.010, has_drafts=False)

    assert measured.cost(8) < 1.1 * CPU_ROWS.cost(8)


@pytest.mark.parametrize("num_tokens", [24, 64, 500])
def test_a_text_that_deceives_every_draft_takes_hardly_longer(num_tokens: int) -> None:
    """Each token is what n-grams say, unless that is drafted: then it is another one."""
    prompt = list(range(8))
    token_ids, taken = prompt * 2, 0.0
    drafter, oracle, budget = NgramDrafter(len(prompt)), NgramDrafter(len(prompt)), DraftBudget()

    for number in range(num_tokens):
        expected = oracle.draft(token_ids, 1) if oracle.follow(token_ids) else prompt[:1]
        budget.add_step()
        candidates = [DraftCandidate(0, drafter.acceptance, 7, budget.own)] if drafter.follow(token_ids) else []
        choice = choose_drafts(1, steep, candidates, [budget.ahead])
        if choice.num_draft_tokens:
            charge_drafts(choice.num_draft_tokens, choice.extension, [budget])
        token_ids += [100 + number] if choice.num_draft_tokens else expected
        taken += 1 + choice.extension

    assert num_tokens < taken < num_tokens / 0.97


@pytest.mark.parametrize("num_tokens", [64, 500])
def test_a_text_beside_others_that_repeat_themselves_takes_hardly_longer(num_tokens: int) -> None:
    budgets, taken, num_drafted = [DraftBudget() for _ in range(4)], 0.0, 0

    for _ in range(num_tokens):
        for budget in budgets:
            budget.add_step()
        candidates = [DraftCandidate(place, 0.98, 7, budgets[place].own) for place in range(3)]
        choice = choose_drafts(4, steep, candidates, [budget.ahead for budget in budgets])
        if choice.num_draft_tokens:
            charge_drafts(choice.num_draft_tokens, choice.extension, budgets)
        for position, num in choice.num_draft_tokens.items():
            budgets[position].add_right(num)
            num_drafted += num
        taken += 1 + choice.extension

    assert num_tokens < taken < num_tokens / 0.97
    assert num_drafted > num_tokens / 20


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
    candidate = DraftCandidate(0, 0.5, 3, PLENTY)  # one token more, nearly

    assert choose_drafts(1, CARD_ROWS.cost, [candidate], [PLENTY], wait=0.5).num_draft_tokens
    assert not choose_drafts(1, CARD_ROWS.cost, [candidate], [PLENTY], wait=1.0).num_draft_tokens
