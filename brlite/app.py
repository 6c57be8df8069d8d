"""Builds the aiohttp application that serves a table of models. `serve`, `proxy`, embedding programs and tests use it.

A request's model name selects a local engine in `ModelTable`, or an upstream through a `Forwarder`. It sets up neither
signal handlers nor logging, so the application can be mounted in another one as a sub-app.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import web

from brlite.config.address import is_loopback_address
from brlite.config.options import Config
from brlite.config.validation import override
from brlite.config.warnings import check_supported
from brlite.engine.async_engine import EngineLoop
from brlite.http.body import BODIES, BodyBudget
from brlite.http.keys import KEYS, ApiKeys
from brlite.http.listen import PROBE_PATHS
from brlite.http.middlewares import add_middlewares
from brlite.http.origin_policy import OriginPolicy
from brlite.proxy.catalog import Catalog
from brlite.proxy.fast_path import FastPaths
from brlite.proxy.forwarder import Forwarder
from brlite.proxy.metrics import ForwardingCollector
from brlite.proxy.middleware import forward_middleware
from brlite.proxy.scrape import Scraper
from brlite.server.background import BACKGROUND, BackgroundResponses
from brlite.server.generate import CONFIG, MODELS, RUNNING, end_all
from brlite.server.handlers import ADD_METRICS, METRICS_PATHS, OPEN_PATHS, PROBES, ROUTES
from brlite.server.idempotency import ANSWERS, IdempotentAnswers
from brlite.server.metrics import COLLECTORS
from brlite.server.model_manager import ModelManager
from brlite.server.response_store import STORE, make_response_store
from brlite.server.served_model import ModelTable, ServedModel

FORWARDER = web.AppKey("forwarder", Forwarder)
ORIGIN_POLICY = web.AppKey("origin_policy", OriginPolicy)


def create_app(
    models: EngineLoop | ModelTable | Config, config: Config | None = None, *, listens_on: str | None = None
) -> web.Application:
    """An application that serves one engine under the config's model name, the models of a table, or those of a config.

    With only a config, the application loads its models at startup, which raises their errors, and closes them at
    cleanup. The caller closes all other engines. Requests for models of the config's upstreams are forwarded.
    Run it with `handler_cancellation=True`, as `HttpServer` does; else requests of disconnected clients continue.
    At shutdown, running streams end with an error event. This function reads files that the config names, such as the
    key file; if that may take long, call it on another thread.

    Requests from pages of other sites are refused. `listens_on` is the address that the server listens on, None if
    unknown. On loopback without keys, only local host names and `server.allowed_hosts` are allowed. Else only
    `server.allowed_hosts` restricts host names.
    """
    config, table = _config_and_table(models, config)
    app = web.Application()
    app[CONFIG] = config
    app[MODELS] = table
    app[RUNNING] = set()
    app[STORE] = make_response_store(config.limits.max_stored_bytes)
    app[ANSWERS] = IdempotentAnswers(config.limits)
    app[BACKGROUND] = BackgroundResponses()
    app[PROBE_PATHS] = PROBES
    app[BODIES] = BodyBudget(config.limits.max_body_bytes_in_flight)
    app.add_routes(ROUTES)
    keys = ApiKeys.from_config(config)
    app[ORIGIN_POLICY] = OriginPolicy(
        config.server.cors_origins,
        config.server.allowed_hosts,
        keys=keys,
        is_loopback=listens_on is not None and is_loopback_address(listens_on),
    )
    add_middlewares(
        app,
        keys=keys,
        open_paths=OPEN_PATHS if config.server.metrics_need_key else OPEN_PATHS | METRICS_PATHS,
        origin_policy=app[ORIGIN_POLICY],
        quiet_paths=PROBES | METRICS_PATHS if config.server.access_log else None,
    )
    _add_forwarding(app, Forwarder(config), config)
    if isinstance(models, Config):
        app.cleanup_ctx.append(_load_models)
    return app


def _config_and_table(models: EngineLoop | ModelTable | Config, config: Config | None) -> tuple[Config, ModelTable]:
    """The config and the table of the arguments of `create_app`. Raises `ConfigError` for a config that is wrong."""
    if isinstance(models, Config) and config is not None:
        raise TypeError("create_app(config) takes no second config")
    config = models if isinstance(models, Config) else config or Config()
    if isinstance(models, ModelTable):
        return config, models
    config = override(config, {}, source="Config")  # one that was made in Python is checked like a file
    if isinstance(models, EngineLoop):
        return config, ModelTable([ServedModel(config.model[0], models)], config.proxy)
    if not isinstance(models, Config):
        raise TypeError(f"create_app takes a config, an engine or a table of models, got {type(models).__name__}")
    check_supported(config)
    return config, ModelTable([ServedModel(spec) for spec in config.model], config.proxy)


async def _load_models(app: web.Application) -> AsyncIterator[None]:
    """Load the config's models at startup or on demand, and close them at cleanup."""
    from brlite.llm import EngineLoader

    config, models = app[CONFIG], app[MODELS]
    async with ModelManager(models, EngineLoader(config), config.engine) as manager:
        await manager.start()
        yield


def fast_paths(app: web.Application) -> FastPaths:
    """The factory for the fast paths of an `HttpServer`'s connections, which forward requests without aiohttp."""
    config = app[CONFIG]
    policy = app[ORIGIN_POLICY]
    access_log = config.server.access_log
    return FastPaths(app[FORWARDER], app[KEYS], config.limits, bodies=app[BODIES], policy=policy, access_log=access_log)


def _add_forwarding(app: web.Application, forwarder: Forwarder, config: Config) -> None:
    """Add the forwarder and its metrics. Also without upstreams, since a reload may add some."""
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
        await app[ANSWERS].close()
        await app[BACKGROUND].close()

    app.cleanup_ctx.append(run)
    app.on_shutdown.append(stop)
    app.middlewares.append(forward_middleware(forwarder, config.limits, is_only_proxy=not config.model))
