"""`brlite serve`: listens first, then loads the models. Owns the process: signals, event loop, exit status.

The port answers within a second of start. Until a model is loaded, its requests get 503 with the progress.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import importlib
import json
import logging
import math
import shlex
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from brlite.app import FORWARDER, create_app, fast_paths
from brlite.checkpoint.model_name import check_path
from brlite.commands.given_config import find_own_config, given_config
from brlite.commands.reload import ConfigSource, Reloader, find_terminal
from brlite.config.options import Config, ModelSpec
from brlite.config.warnings import config_warnings, metrics_notes, sent_variables, usable_connections
from brlite.http.keys import KEYS
from brlite.http.listen import HttpServer
from brlite.process.machine import raise_descriptor_limit
from brlite.process.signals import add_signal_call, remove_signal_call
from brlite.process.streams import configure_logging
from brlite.process.waiting import on_daemon_thread
from brlite.proxy.routing.route_table import RouteTable
from brlite.server.generate import CONFIG, MODELS
from brlite.server.model_manager import ModelManager, OnProgress
from brlite.server.served_model import ModelTable, ServedModel

if TYPE_CHECKING:
    from brlite.llm import AsyncEngine

logger = logging.getLogger(__name__)

# While a step runs Python (sampling, planning), the event loop waits for the GIL at most this long, not 5 ms.
SWITCH_INTERVAL_SECONDS = 0.0005
# Python's 700, 10 and 10 collect several times a step: with 4,000 streams, a fifth of the engine's time.
GC_THRESHOLDS = (50_000, 20, 20)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
REPEATED_SIGNAL_SECONDS = 1.0
DOCKER_STOP_SECONDS = 10  # after which `docker stop` and compose kill by default
CLOSING_SECONDS = 15  # more than closing takes after the grace time
IN_DOCKER = (Path("/.dockerenv"), Path("/run/.containerenv"))
MAX_SHOWN_MODELS = 8
ALL_ADDRESSES = "0.0.0.0"
EXIT_LOST = 1
LOADING = "brlite-load"  # the name of threads


def run(args: argparse.Namespace) -> int:
    """Serve the config of the command line until SIGTERM or SIGINT. Returns the exit status."""
    notes = []
    # The manual's JSON has no field for a host, and its server listens to all addresses. A TOML has its own host.
    if getattr(args, "is_manual", False) and args.host is None and args.config.suffix == ".json":
        args.host = ALL_ADDRESSES
        notes = [f"listening on all addresses ({ALL_ADDRESSES}), as br-vllm-serving does; --host changes it"]
    is_named = args.config is not None
    args.config = args.config or find_own_config()
    files = [args.config] if args.config else []
    return listen(partial(given_config, args), files, notes, is_announced=not is_named and bool(files))


def listen(
    load: Callable[[], Config], files: Sequence[Path], notes: Sequence[str] = (), *, is_announced: bool = False
) -> int:
    """Serve the config that `load` reads. It is read again when the files change.

    `notes` are logged as warnings. With `is_announced`, `find_own_config` has printed the file already.
    """
    config = load()
    configure_logging(config.server.log_level)
    read = [f"config: {file}" for file in files] or ["config: no file, the defaults and the command line"]
    for line in (*(() if is_announced else (*read, *sent_variables(config))), *metrics_notes(config)):
        logger.info("%s", line)
    return serve(config, [*notes, *config_warnings(config)], ConfigSource(tuple(files), load))


def serve(config: Config, warnings: Sequence[str], source: ConfigSource) -> int:
    """Serve until SIGTERM or SIGINT, and apply changes of the config's source. Returns the exit status.

    Raises `ConfigError` or `ModelError`.
    """
    for spec in config.model if config.engine.name is None else ():
        if spec.load == "start" and spec.path is not None:
            check_path(spec.path)
    for line in warnings:
        logger.warning("%s", line)
    raise_descriptor_limit()
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    # Before the loop starts: this reads the key file and the upstreams' certificates, which would block it.
    models = ModelTable([ServedModel(spec) for spec in config.model], config.proxy)
    app = create_app(models, config, listens_on=config.server.host)
    reloader = Reloader(source, config, app[KEYS], app[FORWARDER], models, terminal=find_terminal())
    try:
        loop_run: Callable[[Coroutine[Any, Any, int]], int] = importlib.import_module("uvloop").run
    except ImportError:  # there is none for Windows
        loop_run = asyncio.run
    return loop_run(_serve(app, reloader))


async def _serve(app: web.Application, reloader: Reloader) -> int:
    config, models, forwarder, keys = app[CONFIG], app[MODELS], app[FORWARDER], app[KEYS]
    async with ModelManager(models, ModelLoader(config), config.engine) as manager:
        # By then the grace time is over: closing an engine gives its streams their error event.
        app.on_shutdown.append(lambda _: manager.close())
        address = (config.server.host, config.server.port)
        limits = msgspec.structs.replace(config.limits, max_connections=usable_connections(config))
        server = HttpServer(app, *address, limits, config.server.drain_seconds, fast_paths(app))
        async with _stop_signal(server.end_grace) as stop, reloader, server:
            intentions = [f"forwarding: {show_routes(forwarder.table)}"] if forwarder.table.upstreams else []
            if config.model:
                first = ", ".join(spec.name for spec in config.model if spec.load == "start")
                intentions.insert(0, f"loading {first or 'models when they are asked for'}")
            logger.info("listening on %s; %s", server.url, "; ".join(intentions))
            if any(path.exists() for path in IN_DOCKER):
                logger.info("server.drain_seconds is %g%s", config.server.drain_seconds, _docker_hint(config))
            loading = asyncio.create_task(_load_first(manager), name="brlite-load")
            failing = asyncio.create_task(manager.failure(), name="brlite-failure")
            await _first_of(loading, stop, failing)
            if loading.done():
                loading.result()
                _announce(server.url, models, forwarder.table, needs_key=not keys.is_open)
                await _first_of(stop, failing)
            if failing.done():
                logger.critical("stopping: %s", failing.result())
            logger.info(
                "stopping: running requests have %g seconds to finish, a second signal ends them at once%s",
                config.server.drain_seconds,
                _docker_hint(config),
            )
            models.is_draining = forwarder.is_draining = True
            loading.cancel()
            manager.drain()
        has_failed = failing.done()
        failing.cancel()
        await asyncio.wait([loading, failing])
    return EXIT_LOST if has_failed else 0


def show_routes(table: RouteTable) -> str:
    """Which models go to which upstreams; of many models, the first few."""
    routes = [f"{target.model} → {', '.join(upstream.name for upstream in target.upstreams)}" for target in table]
    more = [f"{len(routes) - MAX_SHOWN_MODELS} more models"] if len(routes) > MAX_SHOWN_MODELS else []
    return "; ".join([*routes[:MAX_SHOWN_MODELS], *more])


async def _load_first(manager: ModelManager) -> None:
    await manager.start()
    # Objects that are alive now stay alive: the collector need not visit them again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    _trim()


class ModelLoader:
    """Loads models for `ModelManager`, and shows the progress on the terminal.

    A disk that hangs does not keep the process from ending.
    """

    def __init__(self, config: Config) -> None:
        self._config = config

    async def known_bytes(self, spec: ModelSpec) -> int | None:
        if self._config.engine.name is not None:
            return 0  # the memory of another engine is not known here
        await on_daemon_thread(partial(_import_loading, is_builtin=True), LOADING)
        from brlite.backends.sizes import known_sizes

        sizes = await on_daemon_thread(partial(known_sizes, spec, self._config.engine), LOADING)
        return None if sizes is None else sizes.num_bytes

    async def is_here(self, spec: ModelSpec) -> bool:
        await on_daemon_thread(partial(_import_loading, is_builtin=self._config.engine.name is None), LOADING)
        from brlite.llm import is_model_here

        return await is_model_here(self._config, spec)

    async def fetch(self, spec: ModelSpec, report: OnProgress) -> None:
        await on_daemon_thread(partial(_import_loading, is_builtin=self._config.engine.name is None), LOADING)
        from brlite.llm import fetch_model

        with _shown(report) as show:
            await fetch_model(self._config, spec, show)

    async def measure(self, spec: ModelSpec, report: OnProgress) -> int:
        await on_daemon_thread(partial(_import_loading, is_builtin=self._config.engine.name is None), LOADING)
        from brlite.llm import model_bytes

        with _shown(report) as show:
            return await model_bytes(self._config, spec, show)

    async def load(self, spec: ModelSpec, report: OnProgress) -> AsyncEngine:
        await on_daemon_thread(partial(_import_loading, is_builtin=self._config.engine.name is None), LOADING)
        from brlite.llm import AsyncEngine

        with _shown(report) as show:
            return await AsyncEngine.load(self._config, spec, show)

    def collect_garbage(self) -> None:
        # What was alive at the start may be garbage now.
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    def release_memory(self) -> None:
        _trim()


def _import_loading(*, is_builtin: bool) -> None:
    """Import the modules that load models. Call it on a thread: half a second of file reads would block the loop."""
    import brlite.llm

    if is_builtin:
        import brlite.backends.sizes
        import brlite.checkpoint.fetch  # noqa: F401
    if sys.stderr.isatty():  # only then there is a bar
        from tqdm import tqdm

        tqdm.get_lock()  # type: ignore[no-untyped-call]  # it imports multiprocessing when it makes its first bar


def _trim() -> None:
    """Return free memory to the system. glibc keeps what other threads freed: some 40 MB after a few loads."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def _shown(report: OnProgress) -> Iterator[OnProgress]:
    """Passes progress from the loading thread to `report`, on the loop, and to the terminal."""
    from brlite.checkpoint.progress import progress_bar

    loop = asyncio.get_running_loop()
    with progress_bar() as draw:

        def show(stage: str, fraction: float) -> None:
            loop.call_soon_threadsafe(report, stage, fraction)
            draw(stage, fraction)

        yield show


async def _first_of(*awaitables: asyncio.Future[Any]) -> None:
    await asyncio.wait(awaitables, return_when=asyncio.FIRST_COMPLETED)


def _docker_hint(config: Config) -> str:
    """The docker options that allow the whole grace time; "" if they are not needed."""
    seconds = config.server.drain_seconds
    if seconds < DOCKER_STOP_SECONDS:
        return ""
    needed = f"--stop-timeout {seconds + CLOSING_SECONDS:g}, stop_grace_period: {seconds + CLOSING_SECONDS:g}s"
    return f"; docker kills after {DOCKER_STOP_SECONDS} unless told otherwise ({needed})"


@asynccontextmanager
async def _stop_signal(on_second: Callable[[], None]) -> AsyncIterator[asyncio.Future[None]]:
    """A future that SIGTERM or SIGINT resolves. A second signal calls `on_second`; a third, or one that comes after the
    block, ends the process.

    Signals within a second count as one, also after the block: wrappers signal both their child and its group.
    """
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()
    last_at = -math.inf

    def is_repeated() -> bool:
        nonlocal last_at
        before, last_at = last_at, time.monotonic()
        return last_at < before + REPEATED_SIGNAL_SECONDS

    def on_signal() -> None:
        if is_repeated():
            return
        if not stop.done():
            stop.set_result(None)
        else:
            logger.info("stopping: running requests are ended now")
            on_second()
            let_next_end_process()

    def end_process(number: int, _: object) -> None:
        if not is_repeated():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def let_next_end_process() -> None:
        for number in STOP_SIGNALS:
            remove_signal_call(loop, number)
            signal.signal(number, end_process)

    for number in STOP_SIGNALS:
        add_signal_call(loop, number, on_signal)
    try:
        yield stop
    finally:
        let_next_end_process()


def _announce(url: str, models: ModelTable, table: RouteTable, *, needs_key: bool) -> None:
    """Print a command to try. Printed, not logged: new users wait for it."""
    model = next((model for model in models if model.engine is not None), next(iter(models), None))
    if model is None:
        name, is_chat = next(iter(table)).model, True
    else:
        name, is_chat = model.name, model.engine is not None and model.engine.tokenizer.has_chat_template
    line = curl_line(url, name, is_chat=is_chat, needs_key=needs_key)
    chat = f"\n\nor: brlite chat --url {url}" if is_chat else ""
    print(f"\nbrlite is ready. Try:\n\n{line}{chat}\n", file=sys.stderr, flush=True)


def curl_line(url: str, model: str, *, is_chat: bool, needs_key: bool) -> str:
    """A shell command that sends the model a prompt and streams its answer."""
    body: dict[str, object] = {"model": model, "stream": True, "max_tokens": 100, "temperature": 0}
    if is_chat:
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": "Why is the sky blue?"}]
    else:
        path, body["prompt"] = "/v1/completions", "The sky is blue because"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if needs_key else ""
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"curl -N {url}{path}{key} \\\n  -H 'Content-Type: application/json' -d {data}"
