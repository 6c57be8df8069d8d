"""What steps cost, measured: by their number of rows, of a draft model, and of a wait between two steps.

The unit of each cost is the time of a step of one row. `drafting.py` compares these costs with what drafts gain.
"""

from __future__ import annotations

from brlite.engine.backend import CPU_ROWS, RowCosts

TIME_WEIGHT = 0.1  # weight of the newest step in a running mean (EWMA) of step times
ROW_WEIGHT = 0.02  # of the newest step in the EWMA of the cost of its number of rows; the first ones weigh more
COMPARED_STEPS = 10  # without drafts, after others of another number of rows. More of them tell nothing of their cost
MOST_CHANGE = 1.2  # of a mean that one step may show, later than the first ones. The same for both means
MAX_ROWS = 32  # of four sequences with seven draft tokens each
EXPIRY_STEPS = 20_000  # steps without drafts: a cost that was measured too high, and ended drafts, is then forgotten
INITIAL_WAIT_COST = 0.5  # until it is measured
MAX_WAIT_COST = 4.0  # of one measurement: a longer wait has another cause, such as a busy processor


class StepCosts:
    """The measured cost of a step by its number of rows: it differs with the precision and with the machine.

    It has jumps, where another tile of rows begins. So each number of rows has a mean of its own. Between two numbers
    that were measured, the cost is interpolated. Above all of them it grows as expected, or faster if those did.
    """

    def __init__(self, expected: RowCosts) -> None:
        self._expected = expected
        self._costs = [1.0] * (MAX_ROWS + 1)  # the means, by number of rows
        self._num_observed = [0] * (MAX_ROWS + 1)
        self._observed_at = [0] * (MAX_ROWS + 1)  # `_num_plain` at the last observation
        self._num_plain = 0  # steps without drafts
        self._seconds = 0.0  # of a step of one row, 0: not measured yet
        self._plain_rows = self._num_alike = 0  # the rows of the last step without drafts, and how many before had them

    def cost(self, num_rows: int) -> float:
        """The cost of a step, in steps of one row."""
        if num_rows <= MAX_ROWS and self._is_measured(num_rows):
            return self._costs[num_rows]
        top = min(num_rows, MAX_ROWS)
        below = next(filter(self._is_measured, range(top, 1, -1)), 1)
        above = next(filter(self._is_measured, range(num_rows + 1, MAX_ROWS + 1)), 0)
        cost = self._costs[below]
        if above:
            return cost + (self._costs[above] - cost) * (num_rows - below) / (above - below)
        expected, expected_below = self._expected.cost(num_rows), self._expected.cost(below)
        by_rows = 1 + (cost - 1) * (expected - 1) / (expected_below - 1) if expected_below > 1 else 0.0
        return max(by_rows, cost * expected / expected_below)

    def _is_measured(self, num_rows: int) -> bool:
        return self._num_observed[num_rows] > 0 and self._num_plain - self._observed_at[num_rows] < EXPIRY_STEPS

    @property
    def row_cost(self) -> float:
        """The cost of one row where there are many."""
        return (self.cost(MAX_ROWS) - self.cost(1)) / (MAX_ROWS - 1)

    def observe(self, num_rows: int, seconds: float, *, has_drafts: bool) -> None:
        """Record the time of a step. Outliers are bounded: another program may have had the processor."""
        known = self.cost(num_rows)
        if not has_drafts:
            self._num_alike = self._num_alike + 1 if num_rows == self._plain_rows else 0
            self._plain_rows = num_rows
        if self._seconds and num_rows <= MAX_ROWS:
            num_observed = 1 + (self._num_observed[num_rows] if self._is_measured(num_rows) else 0)
            newest = _bounded(seconds / self._seconds, known, 2.0 if num_observed < 4 else MOST_CHANGE)
            weight = 1 / (num_observed + 1)
            if has_drafts or self._num_alike < COMPARED_STEPS:
                weight = max(ROW_WEIGHT, weight)
            self._costs[num_rows] = known + weight * (newest - known)
            self._num_observed[num_rows], self._observed_at[num_rows] = num_observed, self._num_plain
        if not has_drafts:
            self._num_plain += 1
            newest, most = seconds / known, 2.0 if self._num_plain < 16 else MOST_CHANGE
            self._seconds = _mean(self._seconds, _bounded(newest, self._seconds or newest, most))


class FreeDrafts:
    """In place of `StepCosts`: rows of drafts cost nothing."""

    row_cost = 0.0

    def cost(self, num_rows: int) -> float:
        return 1.0

    def observe(self, num_rows: int, seconds: float, *, has_drafts: bool) -> None:
        pass


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
