"""Asks every upstream once whether it would serve: connection, health, models. What `brlite check --dial` prints.

It connects as requests do, with the same TLS and key, and asks for no answer of a model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from brlite.config.options import ProxyConfig
from brlite.errors import UpstreamError
from brlite.proxy.routing.client import UpstreamClient, reason_of
from brlite.proxy.routing.health import MAX_LIST_BYTES, is_well
from brlite.proxy.routing.listing import read_list
from brlite.proxy.routing.upstream import Upstream

MODELS_PATH = "/v1/models"
WRONG_KEY = (401, 403)


class Finding(NamedTuple):
    """One thing found out about an upstream."""

    is_good: bool
    text: str


class Dialled(NamedTuple):
    """What was found out about one upstream."""

    name: str
    findings: tuple[Finding, ...]

    @property
    def is_good(self) -> bool:
        return all(finding.is_good for finding in self.findings)

    @property
    def line(self) -> str:
        """All of it, beginning with `ok` or `failed`."""
        verdict = "ok" if self.is_good else "failed"
        return f"{verdict:<8}{self.name}: {'; '.join(finding.text for finding in self.findings)}"


async def dial_all(upstreams: Iterable[Upstream], config: ProxyConfig) -> list[Dialled]:
    """Ask all at once. It takes as long as the slowest, whose every step has its time limit."""
    return await asyncio.gather(*(_dial(upstream, config) for upstream in upstreams))


async def _dial(upstream: Upstream, config: ProxyConfig) -> Dialled:
    findings = [await _connect(upstream, config.connect_seconds)]
    if findings[0].is_good:
        async with UpstreamClient(upstream, config.health_timeout_seconds) as client:
            for ask in (_ask_health, _ask_models):
                findings += await ask(client, upstream)
    return Dialled(upstream.name, tuple(findings))


async def _connect(upstream: Upstream, seconds: float) -> Finding:
    began = time.perf_counter()
    try:
        connection = await asyncio.wait_for(upstream.pool.dial(), seconds)
    except asyncio.TimeoutError:
        return Finding(False, f"cannot connect within {seconds:g} s")
    except OSError as error:
        return Finding(False, f"cannot connect: {reason_of(error)}")
    connection.abort()
    return Finding(True, f"connected in {(time.perf_counter() - began) * 1000:.1f} ms")


async def _ask_health(client: UpstreamClient, upstream: Upstream) -> list[Finding]:
    path = upstream.config.health_path
    if not path:
        return []
    try:
        status = await client.status(path)
    except UpstreamError as error:
        return [Finding(False, str(error))]
    return [Finding(is_well(status), f"{path} answers {status}")]


async def _ask_models(client: UpstreamClient, upstream: Upstream) -> list[Finding]:
    try:
        status = await client.status(MODELS_PATH)
        if status != 200:
            note = ", it wants another key" if status in WRONG_KEY else ", so its models are not known"
            return [Finding(status not in WRONG_KEY, f"{MODELS_PATH} answers {status}{note}")]
        body = await client.read(MODELS_PATH, MAX_LIST_BYTES)
        return list(_compare(upstream, body))
    except UpstreamError as error:
        return [Finding(False, str(error))]


def _compare(upstream: Upstream, body: bytes) -> Iterator[Finding]:
    """Which of the models that it is asked for the upstream lists, by its own names for them, and which not."""
    names = [upstream.config.rename.get(model, model) for model in upstream.config.models]
    listed = read_list(body, names).models
    for is_listed, verb in ((True, "lists"), (False, "does not list")):
        chosen = [name for name in names if (name in listed) is is_listed]
        if chosen:
            yield Finding(is_listed, f"{verb} {', '.join(chosen)}")
