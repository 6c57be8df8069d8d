"""Which drafts of a step pay, and what they may cost each sequence."""

from __future__ import annotations

from itertools import takewhile
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brlite.engine.backend import CARD_ROWS, CPU_ROWS
from brlite.engine.drafting import ALLOWED_LOSS, DraftCandidate, choose_drafts
from brlite.engine.ngrams import NgramDrafter
from tests.engine.test_step_costs import steep

PLENTY = 100.0


def lengths(num_seqs: int, *acceptances: float, budget: float = PLENTY, limit: int = 7) -> list[int]:
    """The lengths of drafts in a step of so many sequences, of which the first ones may have a draft."""
    candidates = [DraftCandidate(place, each, limit) for place, each in enumerate(acceptances)]
    choice = choose_drafts(num_seqs, CPU_ROWS.cost, candidates, [budget] * num_seqs)
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

    candidate = DraftCandidate(0, 0.9, 7)

    assert choose_drafts(1, cost_of, [candidate], [PLENTY]).num_draft_tokens == {0: 7}
    assert not choose_drafts(1, cost_of, [candidate._replace(limit=1)], [PLENTY]).num_draft_tokens


def test_a_draft_costs_its_sequence_no_more_than_its_budget_and_expected_gain() -> None:
    assert [lengths(1, 0.5, budget=budget) for budget in (-0.3, -0.15, 0.0)] == [[0], [1], [2]]


def test_drafts_cost_other_sequences_no_more_than_their_budgets() -> None:
    assert lengths(2, 1.0, budget=0.0) == [0]
    assert lengths(2, 1.0, budget=0.1) == [1]
    assert min(lengths(2, 1.0, 1.0, budget=0.0)) > 0, "each gains more than the other's draft costs it"


def test_steps_of_a_draft_model_are_shared() -> None:
    candidates = [DraftCandidate(place, 0.8, 7, draft_cost=0.3) for place in range(4)]

    assert not choose_drafts(4, CARD_ROWS.cost, candidates[:1], [PLENTY] * 4).num_draft_tokens
    assert choose_drafts(4, CARD_ROWS.cost, candidates, [PLENTY] * 4).num_draft_tokens.keys() == {0, 1, 2, 3}


def test_a_start_is_paid_from_the_budgets_of_all_once() -> None:
    starting, ready = DraftCandidate(0, 0.9, 7, start_cost=1.0), DraftCandidate(1, 0.8, 7)

    poor = choose_drafts(2, CPU_ROWS.cost, [starting, ready], [PLENTY, 0.9])
    rich = choose_drafts(2, CPU_ROWS.cost, [starting, ready], [PLENTY, 9.0])

    assert poor.num_draft_tokens.keys() == {1}, "another one's start does not hold it back"
    assert rich.num_draft_tokens.keys() == {0, 1}
    num_rows = 2 + sum(rich.num_draft_tokens.values())
    assert rich.cost == pytest.approx(1.0 + CPU_ROWS.cost(num_rows) / CPU_ROWS.cost(2) - 1)


@given(
    acceptances=st.lists(st.floats(0, 1), max_size=4),
    budgets=st.lists(st.floats(-1, 3), min_size=4, max_size=4),
    draft_cost=st.sampled_from([0.0, 0.3]),
    start_cost=st.sampled_from([0.0, 0.5]),
)
def test_no_sequence_is_expected_to_lose_more_than_it_can_bear(
    acceptances: list[float], budgets: list[float], draft_cost: float, start_cost: float
) -> None:
    candidates = [
        DraftCandidate(place, each, 7, draft_cost=draft_cost, start_cost=start_cost)
        for place, each in enumerate(acceptances)
    ]

    choice = choose_drafts(4, CPU_ROWS.cost, candidates, budgets)

    for position, most in enumerate(budgets):
        num = choice.num_draft_tokens.get(position, 0)
        expected = sum(acceptances[position] ** n for n in range(1, num + 1)) if num else 0.0
        assert choice.cost <= max(0.0, most + expected) + 1e-9
    if choice.num_draft_tokens:
        assert choice.gain > 1


@pytest.mark.parametrize("num_tokens", [64, 500])
@pytest.mark.parametrize("length", range(2, 11))
def test_a_text_that_leaves_each_of_its_repetitions_takes_hardly_longer(length: int, num_tokens: int) -> None:
    """It repeats so many tokens of its prompt, again and again from another place. N-grams follow it too far."""
    prompt, chosen, text = list(range(40)), Random(length), list[int]()
    while len(text) < num_tokens:
        start = chosen.randrange(len(prompt) - length)
        text += [*prompt[start : start + length], 1000 + len(text)]
    drafter, token_ids, num_done, saved, taken = NgramDrafter(len(prompt)), prompt + text[:1], 1, 0.0, 0.0

    while num_done < num_tokens:
        candidates = [DraftCandidate(0, drafter.acceptance, 7)] if drafter.follow(token_ids) else []
        choice = choose_drafts(1, steep, candidates, [ALLOWED_LOSS * num_done + saved])
        num_drafted = choice.num_draft_tokens.get(0, 0)
        draft = drafter.draft(token_ids, num_drafted) if num_drafted else []
        following = text[num_done : num_done + num_drafted]
        num_right = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(draft, following, strict=False))))
        token_ids += text[num_done : num_done + num_right + 1]
        num_done += num_right + 1
        taken += 1 + choice.cost
        saved += num_right - choice.cost

    assert taken < (num_done - 1) / 0.97


@pytest.mark.parametrize("num_tokens", [24, 64, 500, 2000])
def test_a_text_that_deceives_every_draft_loses_a_full_drafts_gain_once(num_tokens: int) -> None:
    """Each token is what n-grams say, unless that is drafted: then it is another one. A gain is expected each time."""
    prompt, limit, lost = list(range(8)), 7, 0.0
    token_ids, drafter, oracle = prompt * 2, NgramDrafter(len(prompt)), NgramDrafter(len(prompt))

    for number in range(num_tokens):
        expected = oracle.draft(token_ids, 1) if oracle.follow(token_ids) else prompt[:1]
        candidates = [DraftCandidate(0, drafter.acceptance, limit)] if drafter.follow(token_ids) else []
        choice = choose_drafts(1, steep, candidates, [ALLOWED_LOSS * number - lost])
        token_ids += [100 + number] if choice.num_draft_tokens else expected
        lost += choice.cost

    assert 0 < lost < ALLOWED_LOSS * num_tokens + limit


@pytest.mark.parametrize("num_tokens", [64, 500])
def test_a_text_beside_others_that_repeat_themselves_takes_hardly_longer(num_tokens: int) -> None:
    budgets, taken, num_drafted = [0.0] * 4, 0.0, 0

    for _ in range(num_tokens):
        candidates = [DraftCandidate(place, 0.98, 7) for place in range(3)]
        choice = choose_drafts(4, steep, candidates, budgets)
        for position in range(4):
            num = choice.num_draft_tokens.get(position, 0)
            budgets[position] += ALLOWED_LOSS * (1 + num) + num - choice.cost
            num_drafted += num
        taken += 1 + choice.cost

    assert num_tokens < taken < num_tokens / 0.97
    assert num_drafted > num_tokens / 40


def test_drafts_gain_only_if_they_are_worth_the_wait() -> None:
    candidate = DraftCandidate(0, 0.5, 3)  # one token more, nearly

    assert choose_drafts(1, CARD_ROWS.cost, [candidate], [PLENTY], wait=0.5).num_draft_tokens
    assert not choose_drafts(1, CARD_ROWS.cost, [candidate], [PLENTY], wait=1.0).num_draft_tokens
