"""Decides which drafts of a step pay: their expected gain against their measured cost, within each sequence's budget.

The unit of all three is a step: the time that the step takes without drafts. It gives each sequence a token.

* Gain: the k-th token of a draft is right with a chance of `acceptance` ** k. Each right one saves its sequence a step.
* Cost: a step with drafts has more rows and is longer. All its sequences wait for that, with drafts and without.
* Budget: what a sequence may lose: `ALLOWED_LOSS` of its tokens, and the steps that drafts have saved it so far.

The rule: the most gain for the time, where no sequence pays more than its budget and its own expected gain. So each
answer takes hardly longer than without drafts, whoever's they are. For n-grams (`ngrams.py`) and draft models
(`draft_model.py`). Uses numbers only: no blocks, no requests, no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush
from operator import add
from typing import NamedTuple

MARGIN = 1.1  # a draft must yield its cost times this: the best of many estimates is often too high
LEAST_CHANCE = 0.05  # of a draft token to be right: none pays below
ALLOWED_LOSS = 0.01  # with 0.02 four streams gain 2 to 3 % more, and one text of a hundred is at 0.977x, not 0.987x


class DraftCandidate(NamedTuple):
    """A sequence that may have a draft of up to `limit` tokens. `position` is its place in the step.

    `chance` is that of having a draft. `draft_cost` is the cost of a step of the draft model, in steps of one row.
    `start_cost` is paid once, before the first of its drafts, in steps.
    """

    position: int
    acceptance: float
    limit: int
    chance: float = 1.0
    draft_cost: float = 0.0
    start_cost: float = 0.0


class DraftChoice(NamedTuple):
    """The drafts of a step: the number of tokens by the sequence's position, and how many steps they cost.

    `gain` is the expected number of tokens in the time of one without drafts.
    """

    num_draft_tokens: dict[int, int]
    cost: float
    gain: float


NO_DRAFTS = DraftChoice({}, 0.0, 1.0)


def choose_drafts(
    num_rows: int,
    cost_of: Callable[[int], float],
    candidates: Iterable[DraftCandidate],
    budgets: Sequence[float],
    wait: float = 0.0,
) -> DraftChoice:
    """The drafts with the most expected tokens for the time of a step that has `num_rows` without them.

    Draft tokens are added in the order of their chance to be right. The best number of them is taken, since the next
    row may be dear where the rows after it are cheap. `budgets` are by position; a candidate whose `start_cost` is
    above one of them has no draft. `wait` is what a step with drafts costs beside its rows; it and the result of
    `cost_of(num_rows)` are in steps of one row.
    """
    by_position = {each.position: each for each in candidates}
    queue = [(-each.chance * each.acceptance, position) for position, each in by_position.items()]
    heapify(queue)
    plain, drafting, starting, total, gain, cost, num_chosen = cost_of(num_rows), 0.0, 0.0, 0.0, 1.0, 0.0, 0
    order, num_tokens, num_drawing = list[int](), dict.fromkeys(by_position, 0), list[int]()
    gains, least = [0.0] * len(budgets), min(budgets, default=0.0)
    while queue and -queue[0][0] >= LEAST_CHANCE:
        negative, position = heappop(queue)
        each, number = by_position[position], num_tokens[position]
        if each.start_cost and not number:
            if starting + each.start_cost > min(budgets):
                continue
            starting += each.start_cost
        if each.draft_cost:
            drawing = num_drawing[number] if number < len(num_drawing) else 0
            drafting += each.draft_cost * (cost_of(drawing + 1) - (cost_of(drawing) if drawing else 0.0))
            num_drawing[number : number + 1] = [drawing + 1]
        order.append(position)
        num_tokens[position] += 1
        gains[position] += negative * negative  # squared: a doubtful gain pays for less
        total -= negative
        longer = (cost_of(num_rows + len(order)) + drafting) / plain - 1
        better = (1 + total / num_rows) / (1 + MARGIN * longer + wait / plain)
        if better > gain:
            if starting + longer > least:  # some need tokens of their own to lose nothing
                least = min(map(add, budgets, gains))
            if starting + longer <= least:
                gain, cost, num_chosen = better, starting + longer, len(order)
        if num_tokens[position] < each.limit:
            heappush(queue, (negative * each.acceptance, position))
    return DraftChoice(dict(Counter(order[:num_chosen])), cost, gain) if num_chosen else NO_DRAFTS
