"""Health checks: polls each upstream, and takes it out of service, or back in, after a few equal results.

An upstream that is out, or whose last check failed, is checked five times as often as others. Every sixth successful
check also reads its list of models. Failed requests do not count here: the breaker counts them. A check that fails
because this process lacks resources, such as file descriptors, does not count.
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
from brlite.proxy.routing.client import UpstreamClient, WrongKey
from brlite.proxy.routing.listing import MAX_LIST_BYTES, MODELS_PATH, read_list
from brlite.proxy.routing.upstream import Upstream

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
MIN_SUCCESSES = 2
JITTER = 0.2  # without it, proxies that started together would check all upstreams at the same moments
HASTE = 5
CHECKS_PER_LIST = 6
NO_SUCH_PATH = (404, 405, 501)
UNAVAILABLE = 503


class HealthCount:
    """Counts checks in a row. `MAX_FAILURES` or `MIN_SUCCESSES` of them change `is_healthy`."""

    __slots__ = ("_num_contradicting", "is_healthy")

    def __init__(self, is_healthy: bool = True) -> None:
        self.is_healthy = is_healthy
        self._num_contradicting = 0

    @property
    def is_settled(self) -> bool:
        """Whether it is healthy and the last check succeeded."""
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
    """Seconds until the next check; `chance` is a random number from 0 to 1."""
    jitter = 1 + JITTER * (2 * chance - 1)
    return seconds * jitter if is_settled else seconds * jitter / HASTE


def is_well(status: int) -> bool:
    """Whether a status shows a healthy server. A refusal (4xx) does: the server may only require another key.

    A redirect does not: requests would get it too, and it is not followed.
    """
    return 200 <= status < 300 or 400 <= status < 500 or status in NO_SUCH_PATH


class _Failure(NamedTuple):
    """Why a check failed. A server that refuses connections or answers 503 may be finishing its last requests."""

    text: str
    may_be_ending: bool


class _Terms(NamedTuple):
    """Which upstream is checked, how often, and how long an answer may take."""

    upstream: Upstream
    seconds: float
    timeout_seconds: float


class HealthChecks:
    """The checks that run. `watch` sets their upstreams; `close` ends them all."""

    def __init__(self) -> None:
        self._tasks: dict[_Terms, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def watch(self, upstreams: Iterable[Upstream], config: ProxyConfig) -> None:
        """Check these, and no others, from now on. Checks that stay the same are not interrupted."""
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
        """Cancel all checks, and wait until they have ended."""
        while self._tasks:
            self._end(self._tasks.popitem()[1])
        if self._ending:
            await asyncio.wait(self._ending)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        task.cancel()


def _report(task: asyncio.Task[None]) -> None:
    """Log a check that ends by an unexpected error; ordinarily checks end by being cancelled."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("%s has ended: the state of its upstream no longer changes", task.get_name(), exc_info=error)


class _Check:
    """The checks of one upstream, one after the other."""

    def __init__(self, terms: _Terms) -> None:
        self._upstream = terms.upstream
        self._terms = terms
        self._count = HealthCount(terms.upstream.is_healthy)
        self._num_until_list = 0
        self._has_said_no_path = False
        self._has_said_own_fault = False
        self._has_said_wrong_key = False

    async def run(self) -> None:
        """Check until cancelled."""
        async with UpstreamClient(self._upstream, self._terms.timeout_seconds) as client:
            while True:
                await self._check(client)
                await asyncio.sleep(delay(self._terms.seconds, self._count.is_settled, random.random()))

    async def _check(self, client: UpstreamClient) -> None:
        upstream, path, failure = self._upstream, self._upstream.config.health_path, None
        try:
            status = await client.status(path)
            if status in NO_SUCH_PATH and not self._has_said_no_path:
                self._has_said_no_path = True
                text = "upstream %s has no %s (it answers %d): any answer counts as healthy"
                logger.info(text, upstream.name, path, status)
            if not is_well(status):
                failure = _Failure(f"answered {status} to GET {path}", may_be_ending=status == UNAVAILABLE)
        except UpstreamError as error:
            cause = getattr(error.__cause__, "os_error", error.__cause__)
            if isinstance(cause, OSError) and is_own_fault(cause):
                if not self._has_said_own_fault:
                    logger.warning("upstream %s cannot be checked: %s", upstream.name, error)
                self._has_said_own_fault = True
                return
            failure = _Failure(str(error), may_be_ending=not isinstance(error, UpstreamTimeout))
        self._has_said_own_fault = False
        if self._count.note(failure is None):
            upstream.is_healthy = self._count.is_healthy
            if failure is None:
                logger.info("upstream %s is back: %d checks in a row succeeded", upstream.name, MIN_SUCCESSES)
            else:
                text = "upstream %s is out: %d checks in a row failed, the last: %s"
                logger.warning(text, upstream.name, MAX_FAILURES, failure.text)
        if failure is None or failure.may_be_ending or self._count.is_healthy:
            upstream.lost_since = None
        elif upstream.lost_since is None:
            upstream.lost_since = asyncio.get_running_loop().time()
        self._num_until_list -= 1
        if failure is None and self._num_until_list <= 0:
            self._num_until_list = CHECKS_PER_LIST
            await self._read_list(client)

    async def _read_list(self, client: UpstreamClient) -> None:
        """Note the upstream's list of models. An upstream without a list is healthy, too."""
        config = self._upstream.config
        names = {config.rename.get(model, model) for model in config.models}
        upstream = self._upstream
        try:
            upstream.listed, missing = read_list(await client.read(MODELS_PATH, MAX_LIST_BYTES), names)
        except UpstreamError as error:
            if isinstance(error, WrongKey) and not self._has_said_wrong_key:
                self._has_said_wrong_key = True
                text = "upstream %s %s; api_key_env in its [[upstream]] table names the variable that holds it"
                logger.warning(text, upstream.name, error)
            else:
                logger.debug("upstream %s: its list of models is not read: %s", upstream.name, error)
            return
        self._has_said_wrong_key = False
        for model in sorted(missing - upstream.missing.keys()):
            text = "upstream %s does not list the model %s: it is tried only if no other upstream has the model"
            logger.warning(text, upstream.name, model)
        for model in [model for model, until in upstream.missing.items() if until == math.inf and model not in missing]:
            logger.info("upstream %s lists the model %s now", upstream.name, model)
            del upstream.missing[model]
        upstream.missing.update(dict.fromkeys(missing, math.inf))
