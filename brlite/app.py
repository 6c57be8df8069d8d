"""The front door: an aiohttp application over a table of models. `serve`, `proxy`, embedding and tests use this one.

A request's model name leads to a local engine through `ModelTable`, or to an upstream through a `Forwarder`. No signal
handlers and no logging set-up: the application can be mounted in another one as a sub-app.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import web

from brlite.config import Config
from brlite.engine.async_engine import AsyncEngine
from brlite.http.cors import Cors
from brlite.http.keys import KEYS, ApiKeys
from brlite.http.manners import add_manners
from brlite.proxy.catalog import Catalog
from brlite.proxy.forwarder import Forwarder
from brlite.proxy.handler import forward_middleware
from brlite.proxy.lane import Lanes
from brlite.proxy.metrics import ForwardingCollector
from brlite.proxy.scrape import Scraper
from brlite.server.delivery import RUNNING, end_all
from brlite.server.handlers import ADD_METRICS, CONFIG, METRICS_PATHS, MODELS, OPEN_PATHS, ROUTES
from brlite.server.metrics import COLLECTORS
from brlite.server.served_model import ModelTable, ServedModel

FORWARDER = web.AppKey("forwarder", Forwarder)


def create_app(models: AsyncEngine | ModelTable, config: Config | None = None) -> web.Application:
    """An application that serves an engine under the config's model name, or all models of a table.

    Requests for the models of the config's upstreams are forwarded. Whoever made the engines closes them. Run it with
    `handler_cancellation=True` (as `HttpServer` does), or a client that leaves keeps its request running: a stream
    until the next write to it, any other to its end. At the application's shutdown running streams end with an error
    event.
    """
    config = config or Config()
    if isinstance(models, AsyncEngine):
        models = ModelTable([ServedModel(config.model[0], models)], config.proxy)
    app = web.Application()
    app[CONFIG] = config
    app[MODELS] = models
    app[RUNNING] = set()
    app.add_routes(ROUTES)
    add_manners(
        app,
        keys=ApiKeys.from_config(config),
        open_paths=OPEN_PATHS if config.server.metrics_need_key else OPEN_PATHS | METRICS_PATHS,
        cors_origins=config.server.cors_origins,
        access_log=config.server.access_log,
        quiet_paths=OPEN_PATHS | METRICS_PATHS,
    )
    _add_forwarding(app, Forwarder(config), config)
    return app


def lanes(app: web.Application) -> Lanes:
    """What gives the connections of a `HttpServer` their lanes, on which requests are forwarded without aiohttp."""
    config = app[CONFIG]
    origins = config.server.cors_origins
    cors = Cors(origins) if origins else None
    return Lanes(app[FORWARDER], app[KEYS], config.limits, cors=cors, access_log=config.server.access_log)


def _add_forwarding(app: web.Application, forwarder: Forwarder, config: Config) -> None:
    """Without upstreams too: they may come while the server runs."""
    scraper = Scraper(forwarder)
    app[FORWARDER] = forwarder
    app[MODELS].forwarded = Catalog(forwarder)
    app[COLLECTORS] = [ForwardingCollector(forwarder)]
    app[ADD_METRICS] = scraper.add_to

    async def run(app: web.Application) -> AsyncIterator[None]:
        async with forwarder, scraper:
            yield

    async def stop(app: web.Application) -> None:
        end_all(app)
        forwarder.stop()

    app.cleanup_ctx.append(run)
    app.on_shutdown.append(stop)
    app.middlewares.append(forward_middleware(forwarder, config.limits, is_only_proxy=not config.model))
