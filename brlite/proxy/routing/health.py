"""Asks each upstream how it is, and takes it out of the choice, or back in, after a few answers alike.

An upstream that is out or in doubt is asked five times as often as one that is well, so that both ways are short. Its
own list of models is read on the way, now and then. Whether a request failed is not known here: that is the breaker's.
A check that fails for want of descriptors here says nothing of the upstream.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Iterable
from typing import NamedTuple

from brlite.config.options import ProxyConfig
from brlite.errors import UpstreamError, UpstreamTimeout
from brlite.proxy.outcomes import is_own_fault
from brlite.proxy.routing.client import UpstreamClient
from brlite.proxy.routing.listing import read_list
from brlite.proxy.routing.upstream import Upstream

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
MIN_SUCCESSES = 2
JITTER = 0.2  # else the checks of all upstreams, and of all proxies that were started together, fall together
HASTE = 5
CHECKS_PER_LIST = 6
MAX_LIST_BYTES = 1024 * 1024
NO_SUCH_PATH = (404, 405, 501)
UNAVAILABLE = 503


class HealthCount:
    """Counts checks in a row. `is_healthy` changes after so many that contradict it."""

    __slots__ = ("_num_contradicting", "is_healthy")

    def __init__(self, is_healthy: bool = True) -> None:
        self.is_healthy = is_healthy
        self._num_contradicting = 0

    @property
    def is_settled(self) -> bool:
        """Whether it is healthy and the last check said so too."""
        return self.is_healthy and not self._num_contradicting

    def note(self, is_ok: bool) -> bool:
        """Count a check. True if `is_healthy` has changed."""
        if is_ok == self.is_healthy:
            self._num_contradicting = 0
            return False
        self._num_contradicting += 1
        if self._num_contradicting < (MIN_SUCCESSES if is_ok else MAX_FAILURES):
            return False
        self.is_healthy = is_ok
        self._num_contradicting = 0
        return True


def delay(seconds: float, is_settled: bool, chance: float) -> float:
    """How long to wait for the next check; `chance` is a random number from 0 to 1."""
    jitter = 1 + JITTER * (2 * chance - 1)
    return seconds * jitter if is_settled else seconds * jitter / HASTE


def is_well(status: int) -> bool:
    """Whether a status is a living server's. Refusals are: it is there, and may want another key than it was shown.

    A redirect is not: it is what requests would be answered with too, and they do not follow it.
    """
    return 200 <= status < 300 or 400 <= status < 500 or status in NO_SUCH_PATH


class _Failure(NamedTuple):
    """Why a check failed. One that refuses connections, or says 503, may be ending its last requests in good order."""

    text: str
    may_be_ending: bool


class _Terms(NamedTuple):
    """Who is asked, how often, and how long an answer may take."""

    upstream: Upstream
    seconds: float
    timeout_seconds: float


class HealthChecks:
    """The checks that run now. `watch` says whose; `close` ends them all."""

    def __init__(self) -> None:
        self._tasks: dict[_Terms, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def watch(self, upstreams: Iterable[Upstream], config: ProxyConfig) -> None:
        """Check these, and no others, from now on. Those that were checked so already notice nothing."""
        wanted = [
            _Terms(upstream, config.health_seconds, config.health_timeout_seconds)
            for upstream in upstreams
            if upstream.config.health_path
        ]
        for terms in self._tasks.keys() - set(wanted):
            self._end(self._tasks.pop(terms))
        for terms in wanted:
            if terms not in self._tasks:
                name = f"brlite-health-{terms.upstream.name}"
                task = asyncio.get_running_loop().create_task(_Check(terms).run(), name=name)
                task.add_done_callback(_report)
                self._tasks[terms] = task

    async def close(self) -> None:
        """End all checks, and wait until they have."""
        while self._tasks:
            self._end(self._tasks.popitem()[1])
        if self._ending:
            await asyncio.wait(self._ending)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        task.cancel()


def _report(task: asyncio.Task[None]) -> None:
    """Checks end by being cancelled. What nobody foresaw must not end them in silence."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s has ended: its upstream stays as it is", task.get_name(), exc_info=error)


class _Check:
    """The checks of one upstream, one after the other."""

    def __init__(self, terms: _Terms) -> None:
        self._upstream = terms.upstream
        self._terms = terms
        self._count = HealthCount(terms.upstream.is_healthy)
        self._num_until_list = 0
        self._has_said_no_path = False
        self._has_said_own_fault = False

    async def run(self) -> None:
        """Until cancelled."""
        async with UpstreamClient(self._upstream, self._terms.timeout_seconds) as client:
            while True:
                await self._check(client)
                await asyncio.sleep(delay(self._terms.seconds, self._count.is_settled, random.random()))

    async def _check(self, client: UpstreamClient) -> None:
        try:
            failure = await self._failure(client)
        except UpstreamError as error:
            cause = getattr(error.__cause__, "os_error", error.__cause__)
            if isinstance(cause, OSError) and is_own_fault(cause):
                if not self._has_said_own_fault:
                    logger.warning("upstream %s cannot be checked: %s", self._upstream.name, error)
                self._has_said_own_fault = True
                return
            failure = _Failure(str(error), may_be_ending=not isinstance(error, UpstreamTimeout))
        self._has_said_own_fault = False
        if self._count.note(failure is None):
            self._upstream.is_healthy = self._count.is_healthy
            self._log(failure)
        self._note_loss(failure)
        self._num_until_list -= 1
        if failure is None and self._num_until_list <= 0:
            self._num_until_list = CHECKS_PER_LIST
            await self._read_list(client)

    def _note_loss(self, failure: _Failure | None) -> None:
        if failure is None or failure.may_be_ending or self._count.is_healthy:
            self._upstream.lost_since = None
        elif self._upstream.lost_since is None:
            self._upstream.lost_since = asyncio.get_running_loop().time()

    async def _failure(self, client: UpstreamClient) -> _Failure | None:
        """Why the upstream is not well, if its answer says so. Raises `UpstreamError` if there is none."""
        path = self._upstream.config.health_path
        status = await client.status(path)
        if status in NO_SUCH_PATH and not self._has_said_no_path:
            self._has_said_no_path = True
            text = "upstream %s has no %s (it answers %d): that it answers is taken for health"
            logger.info(text, self._upstream.name, path, status)
        if is_well(status):
            return None
        return _Failure(f"answered {status} to GET {path}", may_be_ending=status == UNAVAILABLE)

    def _log(self, failure: _Failure | None) -> None:
        name = self._upstream.name
        if failure is None:
            logger.info("upstream %s is back: %d checks in a row succeeded", name, MIN_SUCCESSES)
        else:
            logger.warning(
                "upstream %s is out: %d checks in a row failed, the last: %s", name, MAX_FAILURES, failure.text
            )

    async def _read_list(self, client: UpstreamClient) -> None:
        """Note what the upstream says of its models. One that says nothing is well all the same."""
        config = self._upstream.config
        names = {config.rename.get(model, model) for model in config.models}
        upstream = self._upstream
        try:
            upstream.listed, missing = read_list(await client.read("/v1/models", MAX_LIST_BYTES), names)
        except UpstreamError as error:
            logger.debug("upstream %s: %s", upstream.name, error)
            return
        for model in sorted(missing - upstream.missing.keys()):
            text = "upstream %s does not list the model %s: it is asked for it only if no other has it"
            logger.warning(text, upstream.name, model)
        for model in [model for model, until in upstream.missing.items() if until == math.inf and model not in missing]:
            logger.info("upstream %s lists the model %s now", upstream.name, model)
            del upstream.missing[model]
        upstream.missing.update(dict.fromkeys(missing, math.inf))
