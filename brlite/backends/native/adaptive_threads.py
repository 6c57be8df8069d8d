"""How many threads the next step takes: all of them, or fewer while other programs use the cores.

Threads meet some 300 times a step, so a thread that lost its core holds up all others: with one busy neighbour on two
cores, two threads were 3.5 times slower than one. Results do not depend on the number. Knows no clock and no threads.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

WINDOW_SECONDS = 0.05  # of computing, and at least so many steps, before a number is judged
WINDOW_STEPS = 4
MIN_PAUSE_SECONDS = 0.5  # of computing, until another number is tried; doubled whenever that was no better
MAX_PAUSE_SECONDS = 8.0
GAIN = 1.1  # more threads must be so much faster to be kept


class AdaptiveThreads:
    """Judges a number of threads by how many of them were computing on average, and not waiting or without a core.

    The same steps cost the same computing on any number, so the number with the highest average is the fastest.
    """

    def __init__(self, num_threads: int) -> None:
        self._most = num_threads
        self.num_settled = num_threads  # what was found best
        self.num_threads = num_threads  # of the next step; another than `num_settled` for as long as it is tried
        self._best_average = 0.0
        self._pause = MIN_PAUSE_SECONDS
        self._rested = MIN_PAUSE_SECONDS  # computing since the last trial
        self._forget()

    def observe(self, seconds: float, busy_seconds: float) -> None:
        """Note a step on `num_threads` threads: how long it took, and what they computed in it together."""
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
                # Half as many could be faster if fewer than half are at work. More are tried after a while.
                half, more = self.num_settled // 2, min(self._most, 2 * self.num_settled)
                self.num_threads = half if average < half else more
        else:
            self._judge_trial(average)

    def _judge_trial(self, average: float) -> None:
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
