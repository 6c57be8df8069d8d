"""Checks every upstream once: connection, health, models. `brlite check --dial` prints the results.

It connects as requests do, with the same TLS and key. No model computes anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import NamedTuple

from brlite.config.options import ProxyConfig
from brlite.errors import UpstreamError
from brlite.process.waiting import within
from brlite.proxy.outcomes import WRONG_KEY
from brlite.proxy.routing.client import UpstreamClient, reason_of
from brlite.proxy.routing.health import is_well
from brlite.proxy.routing.listing import MAX_LIST_BYTES, MODELS_PATH, read_list
from brlite.proxy.routing.upstream import Upstream


class Finding(NamedTuple):
    """One result about an upstream."""

    is_good: bool
    text: str


class Dialled(NamedTuple):
    """The results about one upstream."""

    name: str
    findings: tuple[Finding, ...]

    @property
    def is_good(self) -> bool:
        return all(finding.is_good for finding in self.findings)

    @property
    def line(self) -> str:
        """All results in a line that begins with `ok` or `failed`."""
        verdict = "ok" if self.is_good else "failed"
        return f"{verdict:<8}{self.name}: {'; '.join(finding.text for finding in self.findings)}"


async def dial_all(upstreams: Iterable[Upstream], config: ProxyConfig) -> list[Dialled]:
    """Check all concurrently. Each step of each check has a time limit."""
    return await asyncio.gather(*(_dial(upstream, config) for upstream in upstreams))


async def _dial(upstream: Upstream, config: ProxyConfig) -> Dialled:
    began, findings = time.perf_counter(), []
    try:
        connection = await within(config.connect_seconds, upstream.pool.dial())
        connection.abort()
        findings.append(Finding(True, f"connected in {(time.perf_counter() - began) * 1000:.1f} ms"))
    except asyncio.TimeoutError:
        findings.append(Finding(False, f"cannot connect within {config.connect_seconds:g} s"))
    except OSError as error:
        findings.append(Finding(False, f"cannot connect: {reason_of(error)}"))
    if findings[0].is_good:
        async with UpstreamClient(upstream, config.health_timeout_seconds) as client:
            if path := upstream.config.health_path:
                try:
                    status = await client.status(path)
                    findings.append(Finding(is_well(status), f"{path} answers {status}"))
                except UpstreamError as error:
                    findings.append(Finding(False, str(error)))
            findings += await _ask_models(client, upstream)
    return Dialled(upstream.name, tuple(findings))


async def _ask_models(client: UpstreamClient, upstream: Upstream) -> list[Finding]:
    try:
        status, body = await client.ask(MODELS_PATH, MAX_LIST_BYTES)
        if status != 200:
            note = ", it wants another key" if status in WRONG_KEY else ", so its models are not known"
            return [Finding(status not in WRONG_KEY, f"{MODELS_PATH} answers {status}{note}")]
        names = [upstream.config.rename.get(model, model) for model in upstream.config.models]
        listed = read_list(body, names).models
    except UpstreamError as error:
        return [Finding(False, str(error))]
    findings = []
    for is_listed, verb in ((True, "lists"), (False, "does not list")):
        chosen = [name for name in names if (name in listed) is is_listed]
        if chosen:
            findings.append(Finding(is_listed, f"{verb} {', '.join(chosen)}"))
    return findings
