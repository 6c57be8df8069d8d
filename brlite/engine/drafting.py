"""Prompt lookup (n-grams): drafts the tokens that followed an earlier occurrence of the last two or three tokens.

Drafts cost time and never change a text, since a backend verifies them. This file also computes whether drafts pay,
from the share that was right and the cost of a step; also for drafts of a draft model (`draft_model.py`). Tokens that
a grammar forces are drafts that are always right. Uses token ids only: no blocks, no requests, no model.
"""

from __future__ import annotations

import math
from itertools import takewhile
from operator import eq

from brlite.engine.backend import CPU_ROWS, RowCosts

INITIAL_ACCEPTANCE = 0.2
TIME_WEIGHT = 0.1  # weight of the last step in the running mean of step times
NEWEST_WEIGHT = 0.2  # of the last draft token in `acceptance`: a right one starts drafting, a few wrong ones end it
MARGIN = 1.2  # a draft token must yield its cost times this: the best of many estimates is often too high
INITIAL_CREDIT, CREDIT_SHARE = 0.15, 0.02  # so wrong drafts cost a single answer of 24 tokens about 3 % of its time
ROW_WEIGHT, FORGETTING = 0.03, 0.001  # in the cost of a row: the weight of the last step with drafts, and without
MAX_NEW_TOKENS = 512  # indexed in one call, under a millisecond: a long prompt does not block the event loop

INITIAL_WAIT_COST = 0.5  # until it is measured
MAX_WAIT_COST = 4.0  # of one measurement: a longer wait has another cause, such as a busy processor


class NgramDrafter:
    """One sequence's drafts, from an index of its own n-grams that costs about a microsecond a token.

    Every token is compared with the draft token for it, even if that was not used. So `acceptance`, the share of right
    draft tokens, is measured without a trial: drafting starts as soon as a text repeats itself, and not before.

    `credit` is the most that the next draft may cost, in the time of a token without drafts. Each token of the answer
    adds `CREDIT_SHARE`, each right draft token 1, and a draft takes its cost. So a single text takes hardly longer with
    drafts. Of several texts, each also waits for the drafts of the others.
    """

    def __init__(self, num_prompt_tokens: int) -> None:
        self.acceptance = INITIAL_ACCEPTANCE
        self.credit = INITIAL_CREDIT
        self._draft: list[int] = []  # of the tokens after those seen
        self._num_prompt_tokens = num_prompt_tokens
        self._num_seen = 0
        self._last_two = (-1, -1)
        self._ends: dict[tuple[int, ...], int] = {}  # two or three tokens → the index after their last occurrence
        self._source: int | None = None  # the index whose token is expected again

    def follow(self, token_ids: list[int]) -> bool:
        """Index the tokens since the last call, at most `MAX_NEW_TOKENS`. Returns whether there is a draft now."""
        end = min(len(token_ids), self._num_seen + MAX_NEW_TOKENS)
        self.credit += CREDIT_SHARE * max(0, end - max(self._num_seen, self._num_prompt_tokens))
        if self._draft and end > self._num_seen:
            drawn, draft, self._draft = token_ids[self._num_seen : end], self._draft, []
            self.credit += sum(1 for _ in takewhile(bool, map(eq, draft, drawn)))
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

    def draft(self, token_ids: list[int], num_tokens: int, cost: float = 0.0) -> list[int]:
        """A draft of `num_tokens` tokens, of this cost. Call it after `follow` returned True.

        At the end of the text they repeat.
        """
        assert self._source is not None, "follow says when there is none"
        draft = token_ids[self._source : self._source + num_tokens]
        period = len(token_ids) - self._source
        for index in range(period, num_tokens):
            draft.append(draft[index - period])
        self.credit -= cost
        self._draft = draft
        return draft


class StepForecast:
    """The expected cost and yield (tokens) of a step, while draft tokens are added to its `num_rows`.

    The unit of cost is a step of one row.
    """

    def __init__(self, num_rows: int, costs: RowCosts) -> None:
        self.cost = costs.cost(num_rows)
        self._plain_rate = num_rows / self.cost
        self._costs = costs
        self._num_rows = num_rows
        self._yield = float(num_rows)

    @property
    def rate(self) -> float:
        """Expected tokens for each unit of cost."""
        return self._yield / self.cost

    def gains(self, wait_cost: float) -> bool:
        """Whether drafts are expected to give more than none, though with them the step costs a wait more."""
        return self._yield / (self.cost + wait_cost) > self._plain_rate

    def add_forced(self, token_ids: list[int]) -> list[int]:
        """Add tokens that are certain, and return them. They always pay: else each would take a later step."""
        for _ in token_ids:
            self._add(1.0, 0.0)
        return token_ids

    def add_ngrams(self, drafter: NgramDrafter, token_ids: list[int], limit: int) -> list[int]:
        """Add and return the draft of a sequence, up to `limit` tokens, while each pays and the credit is enough."""
        before = self.cost
        num_draft_tokens = self.add_draft_tokens(drafter.acceptance, limit, credit=drafter.credit)
        return drafter.draft(token_ids, num_draft_tokens, (self.cost - before) * self._plain_rate)

    def add_draft_tokens(
        self, acceptance: float, limit: int, draft_cost: float = 0.0, chance: float = 1.0, credit: float = math.inf
    ) -> int:
        """Add draft tokens of one sequence, up to `limit`, while each raises the rate. Returns their number.

        `draft_cost` is the cost of drawing a draft token, in addition to its row. `chance` is that of having a draft.
        Together they cost at most `credit`, in the time of a token without drafts.
        """
        for num_draft_tokens in range(limit):
            chance *= acceptance  # a draft token counts only if all before it are right
            cost = draft_cost + self._row_cost
            credit -= cost * self._plain_rate
            if credit < 0 or chance * self.cost <= MARGIN * cost * self._yield:
                return num_draft_tokens
            self._add(chance, draft_cost)
        return limit

    @property
    def _row_cost(self) -> float:
        return self._costs.cheap if self._num_rows < self._costs.num_cheap else self._costs.other

    def _add(self, chance: float, draft_cost: float) -> None:
        self.cost += draft_cost + self._row_cost
        self._num_rows += 1
        self._yield += chance


class RowTimes:
    """The cost of rows, measured: it differs with the precision and with the machine.

    Steps with drafts are compared with those without that came before. Each of the latter moves the costs a little
    towards what is expected. So an estimate that was too high, and ended drafts, does not stay.
    """

    def __init__(self, expected: RowCosts) -> None:
        self.costs = self._expected = expected
        self._seconds = 0.0  # of a step of one row, 0: not measured yet

    def observe(self, num_rows: int, seconds: float, *, has_drafts: bool) -> None:
        """Record the time of a step."""
        num_cheap, cheap, other = self.costs
        known = self.costs.cost(num_rows)
        if not has_drafts:
            self._seconds = _mean(self._seconds, seconds / known)
            cheap += FORGETTING * (self._expected.cheap - cheap)
            other += FORGETTING * (self._expected.other - other)
        elif self._seconds:
            cost = min(seconds / self._seconds, 2 * known) - 1
            if num_rows <= num_cheap:
                cheap += ROW_WEIGHT * (cost / (num_rows - 1) - cheap)
            else:
                other += ROW_WEIGHT * ((cost - cheap * (num_cheap - 1)) / (num_rows - num_cheap) - other)
        self.costs = RowCosts(num_cheap, max(0.0, cheap), max(0.0, other))


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


def _mean(before: float, newest: float) -> float:
    """A running mean. A new value counts as at most twice the mean, since a busy machine gives outliers."""
    return before + TIME_WEIGHT * (min(newest, 2 * before) - before) if before else newest
