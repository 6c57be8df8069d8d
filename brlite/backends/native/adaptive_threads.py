"""Chooses the number of threads of the next step: all, or fewer while other programs use the cores.

A step has up to 300 barriers, so all threads wait for a thread that has no core: with one busy process beside it on two
cores, two threads were 3.5 times slower than one. Results do not depend on the number. Times are passed in; there is no
clock and no thread here.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

WINDOW_SECONDS = 0.05  # a number of threads is judged after this time in steps
WINDOW_STEPS = 4  # and at least this many steps
MIN_PAUSE_SECONDS = 0.5  # time in steps until another number is tried; doubled after a trial without gain
MAX_PAUSE_SECONDS = 8.0
GAIN = 1.1  # more threads are kept only if they are faster by this factor


class AdaptiveThreads:
    """Judges a number of threads by how many of them were computing on average, rather than waiting or without a core.

    The computing time of a step is the same for any number, so the number with the highest average is the fastest.
    """

    def __init__(self, num_threads: int) -> None:
        self._most = num_threads
        self.num_settled = num_threads  # the best number found so far
        self.num_threads = num_threads  # of the next step; differs from `num_settled` during a trial
        self._best_average = 0.0
        self._pause = MIN_PAUSE_SECONDS
        self._rested = MIN_PAUSE_SECONDS  # time in steps since the last trial
        self._forget()

    def observe(self, seconds: float, busy_seconds: float) -> None:
        """Record a step on `num_threads` threads: its wall time, and the computing time of all threads together."""
        if self._most == 1:
            return
        self._seconds += seconds
        self._busy += busy_seconds
        self._steps += 1
        if self._seconds < WINDOW_SECONDS or self._steps < WINDOW_STEPS:
            return
        average, elapsed = self._busy / self._seconds, self._seconds
        self._forget()
        if self.num_threads == self.num_settled:
            self._rested += elapsed
            self._best_average = average
            if self._rested >= self._pause:
                # Half as many can be faster only if fewer than half are computing. Otherwise try more.
                half, more = self.num_settled // 2, min(self._most, 2 * self.num_settled)
                self.num_threads = half if average < half else more
            return
        # The end of a trial.
        is_more = self.num_threads > self.num_settled
        is_better = average > self._best_average * (GAIN if is_more else 1.0)
        if not is_better and not is_more and average < self.num_threads // 2:
            self.num_threads //= 2
            return
        self._pause = MIN_PAUSE_SECONDS if is_better else min(MAX_PAUSE_SECONDS, 2 * self._pause)
        self._rested = 0.0
        if not is_better:
            self.num_threads = self.num_settled
            return
        self.num_settled = self.num_threads
        cores = "other programs use the cores" if not is_more else "the cores are free again"
        logger.info("steps take %d of %d threads: %s", self.num_settled, self._most, cores)

    def _forget(self) -> None:
        self._seconds = self._busy = 0.0
        self._steps = 0
