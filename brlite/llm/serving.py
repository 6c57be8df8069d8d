"""`AsyncEngine`: a model in the event loop of its caller; and the loader of a server's models."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import ExitStack, asynccontextmanager
from functools import partial

from brlite.checkpoint.progress import OnProgress, ignore_progress
from brlite.config.options import Config, ModelSpec
from brlite.config.validation import override
from brlite.config.warnings import check_supported
from brlite.engine.async_engine import EngineLoop
from brlite.llm.loading import Assembly, build_engine, needs_no_folder
from brlite.process.waiting import start_daemon

# Up to here the vocabulary is read with the first grammar, in some 50 ms and 4 MB: most is the import of llguidance.
SMALL_VOCABULARY = 1024


class AsyncEngine(EngineLoop):
    """An engine for asyncio programs: `async with AsyncEngine.from_config(config) as engine: …`."""

    @classmethod
    async def load(
        cls, config: Config, spec: ModelSpec | None = None, on_progress: OnProgress | None = None
    ) -> AsyncEngine:
        """Load a model of the config on another thread and start its engine. The caller closes the engine."""
        config = override(config, {}, source="Config")  # one that was made in Python is checked like a file
        check_supported(config)

        def build() -> Assembly:
            assembly = build_engine(config, spec, on_progress)
            with ExitStack() as unless_prepared:
                unless_prepared.callback(assembly.close)
                # Now: reading a large vocabulary later would block all streams.
                if config.grammar.preload and assembly.engine.tokenizer.vocab_size > SMALL_VOCABULARY:
                    (on_progress or ignore_progress)("reading the vocabulary for grammars", 0.0)
                    assembly.engine.compiler.prepare()
                unless_prepared.pop_all()
            return assembly

        def close_unwanted(done: Future[Assembly]) -> None:
            if done.exception() is None:
                done.result().close()

        building = start_daemon(build, "brlite-load")
        try:
            assembly = await asyncio.wrap_future(building)
        except asyncio.CancelledError:
            building.add_done_callback(close_unwanted)
            raise
        engine = cls(assembly.engine, assembly.backend)
        await engine.start()
        return engine

    @classmethod
    @asynccontextmanager
    async def from_config(
        cls, config: Config, spec: ModelSpec | None = None, on_progress: OnProgress | None = None
    ) -> AsyncIterator[AsyncEngine]:
        """Load a model of the config on another thread. The engine runs inside the block and is closed at its end."""
        engine = await cls.load(config, spec, on_progress)
        try:
            yield engine
        finally:
            await engine.close()


async def is_model_here(config: Config, spec: ModelSpec) -> bool:
    """Whether a model is loaded without a download. Searches this machine on another thread."""

    def search() -> bool:
        if config.engine.name is not None and needs_no_folder(config.engine.name):
            return True
        from brlite.checkpoint.fetch import is_here

        return is_here(spec.name, spec.path)

    return await asyncio.wrap_future(start_daemon(search, "brlite-fetch"))


async def fetch_model(config: Config, spec: ModelSpec, on_progress: OnProgress) -> None:
    """Download a model on another thread, if it is not local."""
    from brlite.checkpoint.fetch import default_sources, locate_model

    sources = partial(default_sources, is_for_plugin=config.engine.name is not None)
    fetch = partial(locate_model, spec.name, spec.path, on_progress, sources=sources, level=logging.DEBUG)
    await asyncio.wrap_future(start_daemon(fetch, "brlite-fetch"))  # the load says what is found


async def model_bytes(config: Config, spec: ModelSpec, on_progress: OnProgress | None = None) -> int:
    """The bytes of a model's weights and KV cache. If the model is not local, downloads it on another thread."""
    from brlite.backends.sizes import sizes_at
    from brlite.checkpoint.fetch import locate_model

    def measure() -> int:
        path = locate_model(spec.name, spec.path, on_progress or ignore_progress, level=logging.DEBUG)
        return sizes_at(path, spec, config.engine).num_bytes

    return await asyncio.wrap_future(start_daemon(measure, "brlite-load"))


class EngineLoader:
    """Loads the models of a config, for `server.model_manager`."""

    def __init__(self, config: Config) -> None:
        self.config = config

    async def known_bytes(self, spec: ModelSpec) -> int | None:
        """The bytes of a model that are known without its files: 0 with an engine plugin, else None."""
        return 0 if self.config.engine.name is not None else None

    async def is_here(self, spec: ModelSpec) -> bool:
        return await is_model_here(self.config, spec)

    async def fetch(self, spec: ModelSpec, report: OnProgress) -> None:
        await fetch_model(self.config, spec, report)

    async def measure(self, spec: ModelSpec, report: OnProgress) -> int:
        return await model_bytes(self.config, spec, report)

    async def load(self, spec: ModelSpec, report: OnProgress) -> AsyncEngine:
        return await AsyncEngine.load(self.config, spec, report)

    def collect_garbage(self) -> None:
        gc.collect()

    def release_memory(self) -> None:
        """Does nothing: the program that the engine runs in decides about its heap."""
