"""Adds the upstreams' own metrics to ours, on demand. Each upstream's samples get a label with its name.

Concurrent scrapes share one request to each upstream, so that a client cannot multiply them. An upstream whose metrics
cannot be read is reported as such; the others' metrics are returned all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import NamedTuple

from brlite.errors import InvalidRequest, UpstreamError
from brlite.http.access_log import printable
from brlite.proxy.exposition import BadExposition, Families, Label, MetricFamily, join, read_exposition, sample, write
from brlite.proxy.forwarder import Forwarder
from brlite.proxy.routing.client import UpstreamClient
from brlite.proxy.routing.upstream import Upstream

ALL = "all"
PATH = "/metrics"
LABEL = "upstream"
MAX_BYTES = 4 * 1024 * 1024
OK_NAME = "brlite:upstream_scrape_ok"


class Scrape(NamedTuple):
    """The result of reading one upstream's metrics: its families, or why there are none."""

    name: str
    families: Families
    error: str | None = None


class Scraper:
    """Reads the metrics of a forwarder's upstreams inside `async with`, whose exit cancels running reads."""

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder
        self._tasks: dict[Upstream, asyncio.Task[Scrape]] = {}

    async def __aenter__(self) -> Scraper:
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks.values():
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks.values())

    async def add_to(self, own: bytes, which: str) -> bytes:
        """The `own` metrics in the text format, joined with those of the upstream `which`, or of all ("all").

        Raises `InvalidRequest` for a name that no upstream has.
        """
        upstreams = {upstream.name: upstream for upstream in self._forwarder.table.upstreams}
        if not upstreams:
            raise InvalidRequest("This server has no upstreams.", param="upstream")
        if which != ALL and which not in upstreams:
            allowed = ", ".join([ALL, *upstreams])
            raise InvalidRequest(f"No upstream is called `{which[:200]}`; allowed: {allowed}", param="upstream")
        loop, chosen = asyncio.get_running_loop(), upstreams.values() if which == ALL else [upstreams[which]]
        for each in chosen:
            if each not in self._tasks:  # else another caller has begun it
                self._tasks[each] = loop.create_task(self._scrape(each), name=f"brlite-scrape-{each.name}")
        tasks = [self._tasks[each] for each in chosen]
        await asyncio.wait(tasks)  # if it is cancelled, the tasks go on for other callers
        return await asyncio.to_thread(joined, own, [task.result() for task in tasks])

    async def _scrape(self, upstream: Upstream) -> Scrape:
        try:
            async with UpstreamClient(upstream, self._forwarder.config.health_timeout_seconds) as client:
                body = await client.read(PATH, MAX_BYTES)
            families = await asyncio.to_thread(read_exposition, body.decode(), Label.of(LABEL, upstream.name))
        except (UpstreamError, BadExposition, UnicodeDecodeError) as error:
            return Scrape(upstream.name, {}, printable(str(error)))
        finally:
            del self._tasks[upstream]
        return Scrape(upstream.name, families)


def joined(own: bytes, scrapes: Iterable[Scrape]) -> bytes:
    """One text of all metrics, each family once. Comments name the families and upstreams that were left out."""
    families = read_exposition(own.decode())
    readable = families[OK_NAME] = MetricFamily(OK_NAME, "gauge", "1 if the upstream's metrics could be read, else 0.")
    comments = []
    for scrape in scrapes:
        name = printable(scrape.name)
        readable.samples.append(sample(OK_NAME, [Label.of(LABEL, scrape.name)], "0" if scrape.error else "1"))
        if scrape.error:
            comments.append(f"upstream {name}: {scrape.error}")
        for family in join(families, scrape.families):
            comments.append(f"upstream {name}: {family} was left out: its type differs from the others'")
    return write(families, comments).encode()
