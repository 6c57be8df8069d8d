"""A proxy in this process, with its fast path and its handler, before whatever upstreams a test has."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import NamedTuple

from brlite.app import FORWARDER, create_app, fast_paths
from brlite.config.options import Config, LimitsConfig, ProxyConfig, UpstreamConfig
from brlite.http.body import BODIES, BodyBudget
from brlite.http.keys import KEYS, ApiKeys
from brlite.http.listen import HttpServer
from brlite.proxy.forwarder import Forwarder
from brlite.server.served_model import ModelTable
from tests.limits import PATIENCE_SECONDS

# A test that is about a time limit sets it; else it is not to be met on a slow machine.
PATIENT = ProxyConfig(connect_seconds=PATIENCE_SECONDS, health_timeout_seconds=PATIENCE_SECONDS)


class Proxy(NamedTuple):
    server: HttpServer
    forwarder: Forwarder
    keys: ApiKeys
    bodies: BodyBudget

    @property
    def port(self) -> int:
        return self.server.port


@asynccontextmanager
async def run_proxy(
    *upstreams: UpstreamConfig,
    proxy: ProxyConfig | None = None,
    limits: LimitsConfig | None = None,
    grace_seconds: float = 1.0,
    listens_on: str | None = None,
    **options: object,
) -> AsyncIterator[Proxy]:
    """Afterwards nothing is left of any request, and during it nothing goes wrong that only the loop would hear of."""
    loop = asyncio.get_running_loop()
    shouts: list[object] = []
    loop.set_exception_handler(lambda loop, context: shouts.append(context))
    config = Config(model=(), upstream=upstreams, proxy=proxy or PATIENT, limits=limits or LimitsConfig(), **options)  # type: ignore[arg-type]  # any other field of Config
    app = create_app(ModelTable([]), config, listens_on=listens_on)
    forwarder = app[FORWARDER]
    async with HttpServer(app, "127.0.0.1", 0, config.limits, grace_seconds, fast_paths(app)) as server:
        yield Proxy(server, forwarder, app[KEYS], app[BODIES])
        await wait_until(lambda: forwarder.num_active == 0)
        assert [upstream.num_in_flight for upstream in forwarder.table.upstreams if upstream.num_in_flight] == []
        assert [target for target in forwarder.table if target.limit.num_in_flight or target.limit.num_waiting] == []
    await wait_until(lambda: not any(upstream.pool.connections for upstream in forwarder.table.upstreams))
    assert server.num_connections == 0
    assert app[BODIES].num_bytes == 0
    assert shouts == []


async def wait_until(is_so: object, seconds: float = PATIENCE_SECONDS) -> None:
    """Wait until it is so. Raises `AssertionError` if that takes longer."""
    assert callable(is_so)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not is_so():
        assert loop.time() < deadline, "it never was so"
        await asyncio.sleep(0.01)


@contextmanager
def no_descriptors() -> Iterator[None]:
    """While inside, no file or socket can be opened in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
