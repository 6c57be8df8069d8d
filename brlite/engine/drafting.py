"""Guesses at what a sequence says next: where its last words stood before, what followed them then is proposed again.

Guesses cost time and never change a text, since a backend verifies them. Whether they pay is decided here too, from how
often they were right and from what a step costs. Tokens that a grammar forces are drafts that are always right. Knows
token ids only: no blocks, no requests, no model.
"""

from __future__ import annotations

INITIAL_ACCEPTANCE = 0.2
NEWEST_WEIGHT = 0.2  # of the last guess in the estimate: one right guess is tried out, a few wrong ones end it
MARGIN = 1.2  # what a guess is to bring for its cost, since estimates that came out too high are the ones acted upon
MAX_NEW_TOKENS = 512  # taken in at a time, under a millisecond: a long prompt does not hold up the event loop

# What one more row adds to a step, in steps of one row. Measured on native int8 steps on two cores: up to four rows a
# step waits for memory, and a row is nearly free; beyond that it computes.
CHEAP_ROWS = 4
CHEAP_ROW_COST = 0.09
ROW_COST = 0.2


class Drafter:
    """One sequence's guesses, by an index of its own words that costs about a microsecond a token.

    Every token is compared with what would have been guessed for it, whether it was or not. So `acceptance`, the part
    of guesses that are right, is known without trying: a text is not guessed at until it repeats itself, then at once.
    """

    def __init__(self, num_prompt_tokens: int) -> None:
        self.acceptance = INITIAL_ACCEPTANCE
        self._num_prompt_tokens = num_prompt_tokens
        self._num_seen = 0
        self._last_two = (-1, -1)
        self._ends: dict[tuple[int, ...], int] = {}  # two or three tokens → where they stood last, the index behind
        self._source: int | None = None  # the index whose token is expected again

    def follow(self, token_ids: list[int]) -> bool:
        """Take in the tokens since the last call, or some of them if they are many. Whether there is a guess now."""
        end = min(len(token_ids), self._num_seen + MAX_NEW_TOKENS)
        for position in range(self._num_seen, end):
            self._take_in(token_ids, position)
        self._num_seen = end
        return self._source is not None and end == len(token_ids)

    def guess(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """The next tokens, after `follow` said that there is a guess. What reaches the end goes round."""
        assert self._source is not None, "follow says when there is none"
        draft = token_ids[self._source : self._source + num_tokens]
        period = len(token_ids) - self._source
        for index in range(period, num_tokens):
            draft.append(draft[index - period])
        return draft

    def _take_in(self, token_ids: list[int], position: int) -> None:
        token_id = token_ids[position]
        if position == self._num_prompt_tokens:
            self.acceptance = INITIAL_ACCEPTANCE  # a prompt that repeats itself promises nothing of the answer
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


class StepForecast:
    """What a step will cost and how many tokens it will yield, while guesses are added to its `num_rows`."""

    def __init__(self, num_rows: int) -> None:
        num_cheap = min(num_rows, CHEAP_ROWS)
        self._num_rows = num_rows
        self._cost = 1 + CHEAP_ROW_COST * (num_cheap - 1) + ROW_COST * (num_rows - num_cheap)
        self._yield = float(num_rows)

    def add_forced(self, token_ids: list[int]) -> list[int]:
        """Add tokens that are certain, and return them. They pay always: later steps would compute them one by one."""
        for _ in token_ids:
            self._cost += CHEAP_ROW_COST if self._num_rows < CHEAP_ROWS else ROW_COST
            self._num_rows += 1
            self._yield += 1
        return token_ids

    def add_guesses(self, acceptance: float, limit: int) -> int:
        """Add as many guesses of one sequence as raise the yield for the cost, up to `limit`. Returns their number."""
        chance = 1.0
        for num_guesses in range(limit):
            chance *= acceptance  # a guess counts only if all before it are right
            cost = CHEAP_ROW_COST if self._num_rows < CHEAP_ROWS else ROW_COST
            if chance * self._cost <= MARGIN * cost * self._yield:
                return num_guesses
            self._num_rows += 1
            self._cost += cost
            self._yield += chance
        return limit
