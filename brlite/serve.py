"""`brlite serve`: listen first, load after, and leave in good order. Owns the process: signals, loop, exit status.

The port answers within a second of start; until a model is loaded its requests get 503 with how far it is.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import logging
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from brlite.app import create_app
from brlite.config import Config
from brlite.http.keys import ApiKeys
from brlite.http.listen import HttpServer
from brlite.server.served_model import ModelTable, ServedModel

logger = logging.getLogger(__name__)

# While a step runs Python (sampling, planning) the event loop waits this long at most for its turn, not 5 ms.
SWITCH_INTERVAL_SECONDS = 0.0005
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEATED_SIGNAL_SECONDS = 1.0


def run(config: Config, warnings: list[str]) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status; raises `ConfigError` or `ModelError`."""
    for line in warnings:
        logger.warning("%s", line)
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    return _event_loop_run()(_serve(config))


def _event_loop_run() -> Callable[[Coroutine[Any, Any, int]], int]:
    try:
        uvloop = importlib.import_module("uvloop")  # the extra brlite[fast]
    except ImportError:
        return asyncio.run
    run: Callable[[Coroutine[Any, Any, int]], int] = uvloop.run
    return run


async def _serve(config: Config) -> int:
    models = ModelTable([ServedModel(spec) for spec in config.model], config.proxy)
    app = create_app(models, config)
    async with AsyncExitStack() as engines:
        # By then the grace time is over: closing an engine gives its streams their error event.
        app.on_shutdown.append(lambda _: engines.aclose())
        server = HttpServer(app, config.server.host, config.server.port, config.limits, config.server.drain_seconds)
        async with _stop_signal() as stop, server:
            logger.info("listening on %s; loading %s", server.url, ", ".join(spec.name for spec in config.model))
            loading = asyncio.create_task(_load_all(config, models, engines), name="brlite-load")
            await _first_of(loading, stop)
            if loading.done():
                loading.result()
                _announce(server.url, config, models)
                await stop
            logger.info("stopping: running requests have %g seconds to finish", config.server.drain_seconds)
            models.is_draining = True
            loading.cancel()
        await asyncio.wait([loading])
    return 0


async def _load_all(config: Config, models: ModelTable, engines: AsyncExitStack) -> None:
    """Load one model after the other, so that memory peaks once."""
    from brlite.checkpoint.fetch import progress_bar
    from brlite.llm import AsyncEngine

    for spec in config.model:
        with progress_bar() as show:
            report = _reporter(models.find(spec.name), show)
            engine = await engines.enter_async_context(AsyncEngine.from_config(config, spec, report))
        models.find(spec.name).engine = engine
        logger.info("model %s is ready on %s", spec.name, engine.info.device)
    # What is alive now stays alive: the collector need not walk it again.
    gc.collect()
    gc.freeze()


def _reporter(model: ServedModel, show: Callable[[str, float], None]) -> Callable[[str, float], None]:
    """Takes progress from the loading thread to `/ready`, on the loop, and to the terminal."""
    loop = asyncio.get_running_loop()

    def report(stage: str, fraction: float) -> None:
        loop.call_soon_threadsafe(model.report, stage, fraction)
        show(stage, fraction)

    return report


async def _first_of(*awaitables: asyncio.Future[Any]) -> None:
    await asyncio.wait(awaitables, return_when=asyncio.FIRST_COMPLETED)


@asynccontextmanager
async def _stop_signal() -> AsyncIterator[asyncio.Future[None]]:
    """A future that SIGTERM or SIGINT resolves.

    A second signal has its usual effect, but not within a second: wrappers signal their child and its group too.
    """
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def restore() -> None:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)

    def on_signal() -> None:
        if not stop.done():
            stop.set_result(None)
            loop.call_later(REPEATED_SIGNAL_SECONDS, restore)

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        restore()


def _announce(url: str, config: Config, models: ModelTable) -> None:
    """A line to paste. Printed, not logged: it is what a newcomer waits for."""
    name = config.model[0].name
    engine = models.engine(name)
    needs_key = not ApiKeys.from_config(config).is_open
    line = curl_line(url, name, is_chat=engine.tokenizer.has_chat_template, needs_key=needs_key)
    print(f"\nbrlite is ready. Try:\n\n{line}\n", file=sys.stderr, flush=True)


def curl_line(url: str, model: str, *, is_chat: bool, needs_key: bool) -> str:
    """A shell command that asks the model something and shows its answer as it comes."""
    body: dict[str, object] = {"model": model, "stream": True, "max_tokens": 100, "temperature": 0}
    if is_chat:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": "Why is the sky blue?"}]
    else:
        path, body["prompt"] = "/v1/completions", "The sky is blue because"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if needs_key else ""
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"curl -N {url}{path}{key} \\\n  -H 'Content-Type: application/json' -d {data}"
