"""Prompt lookup (n-grams): drafts the tokens that followed an earlier occurrence of the last two or three tokens.

Drafts cost time and never change a text, since a backend verifies them. This file also chooses the drafts of a step,
from the share that was right, the cost of rows and each sequence's budget; also for a draft model (`draft_model.py`).
Uses token ids only: no blocks, no requests, no model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import takewhile
from operator import add
from typing import NamedTuple

from brlite.engine.backend import CPU_ROWS, RowCosts

INITIAL_ACCEPTANCE = 0.2
TIME_WEIGHT = 0.1  # weight of the last step in the running mean of step times
NEWEST_WEIGHT = 0.2  # of the last draft token in `acceptance`: a right one starts drafting, a few wrong ones end it
MARGIN = 1.2  # a draft must yield its cost times this: the best of many estimates is often too high
LEAST_CHANCE = 0.05  # of a draft token to be right: none pays below
INITIAL_CREDIT, OWN_SHARE = 0.15, 0.02  # so wrong drafts cost a single answer of 24 tokens about 3 % of its time
OTHERS_SHARE = 0.02  # 0.1 gives four streams half the gain more, and 0.91x to the text that loses most
ROW_WEIGHT, FORGETTING = 0.02, 0.001  # in the cost of a row: the weight of a step, and of what is expected
MAX_MEASURED_ROWS = 32  # of four sequences with seven draft tokens each
MAX_NEW_TOKENS = 512  # indexed in one call, under a millisecond: a long prompt does not block the event loop

INITIAL_WAIT_COST = 0.5  # until it is measured
MAX_WAIT_COST = 4.0  # of one measurement: a longer wait has another cause, such as a busy processor


class NgramDrafter:
    """One sequence's drafts, from an index of its own n-grams that costs about a microsecond a token.

    Every token is compared with the draft token for it, even if that was not used. So `acceptance`, the share of right
    draft tokens, is measured without a trial: drafting starts as soon as a text repeats itself, and not before.
    """

    def __init__(self, num_prompt_tokens: int) -> None:
        self.acceptance = INITIAL_ACCEPTANCE
        self._num_prompt_tokens = num_prompt_tokens
        self._num_seen = 0
        self._last_two = (-1, -1)
        self._ends: dict[tuple[int, ...], int] = {}  # two or three tokens → the index after their last occurrence
        self._source: int | None = None  # the index whose token is expected again

    def follow(self, token_ids: list[int]) -> bool:
        """Index the tokens since the last call, at most `MAX_NEW_TOKENS`. Returns whether there is a draft now."""
        end = min(len(token_ids), self._num_seen + MAX_NEW_TOKENS)
        for position in range(self._num_seen, end):
            token_id = token_ids[position]
            if position == self._num_prompt_tokens:
                self.acceptance = INITIAL_ACCEPTANCE  # repetitions in the prompt do not predict any in the answer
            if self._source is not None:
                is_right = token_ids[self._source] == token_id
                self.acceptance += NEWEST_WEIGHT * (is_right - self.acceptance)
                self._source = self._source + 1 if is_right else None
            first, second = self._last_two
            pair, triple = (second, token_id), (first, second, token_id)
            if self._source is None:
                self._source = self._ends.get(triple) or self._ends.get(pair)
            self._ends[pair] = self._ends[triple] = position + 1
            self._last_two = pair
        self._num_seen = end
        return self._source is not None and end == len(token_ids)

    def draft(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """A draft of `num_tokens` tokens; at the end of the text they repeat. Call it after `follow` returned True."""
        assert self._source is not None, "follow says when there is none"
        draft = token_ids[self._source : self._source + num_tokens]
        period = len(token_ids) - self._source
        for index in range(period, num_tokens):
            draft.append(draft[index - period])
        return draft


class DraftBudget:
    """What drafts may cost one sequence, in steps without drafts. So a single text takes hardly longer with drafts.

    `own` is the most that its own next draft may cost. `ahead` is the most that drafts of others may cost it: how many
    steps it is ahead of an answer without drafts, and a share of its steps.
    """

    __slots__ = ("ahead", "own")

    def __init__(self) -> None:
        self.own, self.ahead = INITIAL_CREDIT, 0.0

    def add_step(self) -> None:
        self.own += OWN_SHARE
        self.ahead += OTHERS_SHARE

    def add_right(self, num_tokens: int) -> None:
        """Note right draft tokens: each saves a step."""
        self.own += num_tokens
        self.ahead += num_tokens

    def charge(self, extension: float, own: float) -> None:
        """Note that a step is longer by `extension`, `own` of it for this sequence's draft."""
        self.own -= own
        self.ahead -= extension


class DraftCandidate(NamedTuple):
    """A sequence that may have a draft of up to `limit` tokens. `position` is its place in the step.

    `chance` is that of having a draft, `credit` the most that it may cost. `draft_cost` is the cost of a step of the
    draft model, in steps of one row.
    """

    position: int
    acceptance: float
    limit: int
    credit: float
    chance: float = 1.0
    draft_cost: float = 0.0


class DraftChoice(NamedTuple):
    """The drafts of a step: the number of tokens by the sequence's position, and how much longer the step takes.

    `gain` is the expected number of tokens in the time of one without drafts.
    """

    num_draft_tokens: dict[int, int]
    extension: float
    gain: float


def charge_drafts(num_draft_tokens: Mapping[int, int], extension: float, budgets: Sequence[DraftBudget]) -> None:
    """Charge to all sequences of a step, by position, that it is longer for these drafts."""
    num_all = sum(num_draft_tokens.values())
    for position, budget in enumerate(budgets):
        budget.charge(extension, extension * num_draft_tokens.get(position, 0) / num_all)


def choose_drafts(
    num_rows: int,
    cost_of: Callable[[int], float],
    candidates: Iterable[DraftCandidate],
    ahead: Sequence[float],
    wait: float = 0.0,
) -> DraftChoice:
    """The drafts with the most expected tokens for the time of a step that has `num_rows` without them.

    Draft tokens are added in the order of their chance to be right. The best number of them is taken, since the next
    row may be dear where the rows after it are cheap. All sequences wait for a longer step: `ahead` is how much each
    may lose, by position. `wait` is what a step with drafts costs beside its rows.
    """
    by_position = {each.position: each for each in candidates}
    queue = [(-each.chance * each.acceptance, position) for position, each in by_position.items()]
    heapify(queue)
    plain, drafting, total, gain, extension, num_chosen = cost_of(num_rows), 0.0, 0.0, 1.0, 0.0, 0
    order, num_tokens, num_drawing = list[int](), dict.fromkeys(by_position, 0), list[int]()
    expected, least_ahead = [0.0] * len(ahead), min(ahead, default=0.0)
    while queue and -queue[0][0] >= LEAST_CHANCE:
        negative, position = heappop(queue)
        each, number = by_position[position], num_tokens[position]
        drawing = num_drawing[number] if number < len(num_drawing) else 0
        own_drafting = each.draft_cost * (cost_of(drawing + 1) - (cost_of(drawing) if drawing else 0.0))
        longer = (cost_of(num_rows + len(order) + 1) + drafting + own_drafting) / plain - 1
        if each.credit * (len(order) + 1) < longer * (number + 1):
            continue
        drafting += own_drafting
        num_drawing[number : number + 1] = [drawing + 1]
        order.append(position)
        num_tokens[position] += 1
        expected[position] -= negative / MARGIN
        total -= negative
        better = (1 + total / num_rows) / (1 + MARGIN * longer + wait / plain)
        if better > gain:
            if longer > least_ahead:  # some need tokens of their own to lose nothing
                least_ahead = min(map(add, ahead, expected))
            if longer <= least_ahead:
                gain, extension, num_chosen = better, longer, len(order)
        if num_tokens[position] < each.limit:
            heappush(queue, (negative * each.acceptance, position))
    return DraftChoice(dict(Counter(order[:num_chosen])), extension, gain)


class RowTimes:
    """The cost of a step by its number of rows, measured: it differs with the precision and with the machine.

    It has jumps, where another tile of rows begins. Steps are compared with those without drafts that came before. Each
    of the latter moves the costs a little towards what is expected. So an estimate that was too high, and ended drafts,
    does not stay.
    """

    def __init__(self, expected: RowCosts) -> None:
        self._expected = expected
        self._ratios = [1.0] * (MAX_MEASURED_ROWS + 1)  # of the measured to the expected cost, by rows
        self._num_observed = [0] * (MAX_MEASURED_ROWS + 1)
        self._num_plain = 0
        self._seconds = 0.0  # of a step of one row, 0: not measured yet

    def cost(self, num_rows: int) -> float:
        """The cost of a step, in steps of one row."""
        return self._expected.cost(num_rows) * self._ratios[min(num_rows, MAX_MEASURED_ROWS)]

    @property
    def row_cost(self) -> float:
        """The cost of one row where there are many."""
        return (self.cost(MAX_MEASURED_ROWS) - self.cost(1)) / (MAX_MEASURED_ROWS - 1)

    def observe(self, num_rows: int, seconds: float, *, has_drafts: bool) -> None:
        """Record the time of a step."""
        known = self.cost(num_rows)
        if self._seconds and num_rows <= MAX_MEASURED_ROWS:
            self._num_observed[num_rows] += 1
            weight = max(ROW_WEIGHT, 1 / (self._num_observed[num_rows] + 2))  # the first one counts a third
            cost = _bounded(seconds / self._seconds, known, 2.0 if self._num_observed[num_rows] < 4 else 1.2)
            self._ratios[num_rows] += weight * (cost / self._expected.cost(num_rows) - self._ratios[num_rows])
            for rows in (range(num_rows + 1, MAX_MEASURED_ROWS + 1), range(num_rows - 1, 0, -1)):
                unknown = list(takewhile(lambda rows: not self._num_observed[rows], rows))
                is_last = len(unknown) == len(rows)
                for near in unknown if is_last else unknown[: len(unknown) // 2]:
                    self._ratios[near] = self._ratios[num_rows]
        if not has_drafts:
            self._num_plain += 1
            newest = _bounded(seconds / known, self._seconds or seconds / known, 2.0 if self._num_plain < 16 else 1.1)
            self._seconds = _mean(self._seconds, newest)
            self._ratios = [ratio + FORGETTING * (1 - ratio) for ratio in self._ratios]


class DraftCost:
    """The measured cost of a draft model's step, in steps of one row of the served model."""

    def __init__(self, expected: float, rows: RowCosts = CPU_ROWS) -> None:
        """`expected` is the cost of a step of one row before there are measurements."""
        self._expected = expected
        self._rows = rows
        self._draft_seconds = self._seconds = 0.0  # of a step of one row, 0: not measured yet

    def per_draft_token(self, num_seqs: int) -> float:
        """The cost of one draft token if `num_seqs` sequences get theirs in the same steps."""
        is_measured = self._draft_seconds and self._seconds
        cost = self._draft_seconds / self._seconds if is_measured else self._expected
        return cost * self._rows.cost(num_seqs) / num_seqs

    def observe_step(self, num_rows: int, seconds: float) -> None:
        """Record the time of a step of the served model."""
        self._seconds = _mean(self._seconds, seconds / self._rows.cost(num_rows))

    def observe_drafts(self, num_rows: list[int], seconds: float) -> None:
        """Record the total time of steps of the draft model, with the number of rows of each."""
        cost = sum(map(self._rows.cost, num_rows))
        self._draft_seconds = _mean(self._draft_seconds, seconds / cost)


class WaitCost:
    """The measured time that a device loses if the next step is launched after a result, not before: the host's work.

    `cost` is in steps of one row.
    """

    def __init__(self, rows: RowCosts) -> None:
        self.cost = INITIAL_WAIT_COST
        self._rows = rows
        self._seconds = 0.0  # of a step of one row that was launched ahead, 0: not measured yet

    def observe(self, num_rows: int, seconds: float, *, is_ahead: bool) -> None:
        """Record the time between the ends of two steps. `is_ahead`: the later one was launched ahead."""
        cost = self._rows.cost(num_rows)
        if is_ahead:
            self._seconds = _mean(self._seconds, seconds / cost)
        elif self._seconds:
            wait = min(max(0.0, seconds / self._seconds - cost), MAX_WAIT_COST)
            self.cost += TIME_WEIGHT * (wait - self.cost)


def _bounded(newest: float, known: float, most: float) -> float:
    """`newest`, but at most so many times more or less than what is known: then outliers hardly move a mean."""
    return min(max(newest, known / most), known * most)


def _mean(before: float, newest: float) -> float:
    """A running mean. A new value counts as at most twice the mean, since a busy machine gives outliers."""
    return before + TIME_WEIGHT * (min(newest, 2 * before) - before) if before else newest
