"""The front door: an aiohttp application over a table of models. `serve`, embedding and tests all use this one.

A request's model name leads to a local engine through `ModelTable`; other servers' models will be the same table's
other door. No signal handlers and no logging set-up: the application can be mounted in another one as a sub-app.
"""

from __future__ import annotations

from aiohttp import web

from brlite.config import Config
from brlite.engine.async_engine import AsyncEngine
from brlite.http.keys import ApiKeys
from brlite.http.manners import add_manners
from brlite.server.handlers import CONFIG, METRICS_PATHS, MODELS, OPEN_PATHS, ROUTES
from brlite.server.served_model import ModelTable, ServedModel


def create_app(models: AsyncEngine | ModelTable, config: Config | None = None) -> web.Application:
    """An application that serves an engine under the config's model name, or all models of a table.

    Whoever made the engines closes them. Run it with `handler_cancellation=True` (as `HttpServer` does), or a client
    that leaves keeps its request running: a stream until the next write to it, any other to its end.
    """
    config = config or Config()
    if isinstance(models, AsyncEngine):
        models = ModelTable([ServedModel(config.model[0], models)], config.proxy)
    app = web.Application()
    app[CONFIG] = config
    app[MODELS] = models
    app.add_routes(ROUTES)
    add_manners(
        app,
        keys=ApiKeys.from_config(config),
        open_paths=OPEN_PATHS if config.server.metrics_need_key else OPEN_PATHS | METRICS_PATHS,
        cors_origins=config.server.cors_origins,
        access_log=config.server.access_log,
        quiet_paths=OPEN_PATHS | METRICS_PATHS,
    )
    return app
