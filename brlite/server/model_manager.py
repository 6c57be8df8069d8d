"""Decides which models are in memory: loads them for waiting requests, unloads them when idle or to make room.

`decide` is the whole policy, without effects. `ModelManager` carries out its decisions one by one, in one task. Files
are fetched before that, of up to `max_downloads` models at once: a download that stalls holds back no other load. The
`Loader` implements the loading.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from brlite.config.options import EngineConfig, ModelSpec
from brlite.config.warnings import GIB, check_memory
from brlite.engine.async_engine import EngineLoop
from brlite.errors import BrliteError, EngineError
from brlite.process.waiting import within
from brlite.server.served_model import ServedModel

logger = logging.getLogger(__name__)

BLOCKED = "waiting for memory that busy models hold"
QUEUED = "waiting for its turn to be downloaded"
ASKING = "waiting for the hub's answer"
YIELDING = "waiting for its next turn: another model is wanted"

OnProgress = Callable[[str, float], None]


class Loader(Protocol):
    """Loads models into memory. `report` may be called from any thread.

    Only `is_here` and `fetch` are called for several models at once.
    """

    async def known_bytes(self, spec: ModelSpec) -> int | None:
        """The bytes of weights and KV cache; None if the model must be downloaded to find out."""
        ...

    async def is_here(self, spec: ModelSpec) -> bool:
        """Whether the model can be loaded without a download."""
        ...

    async def fetch(self, spec: ModelSpec, report: OnProgress) -> None:
        """Download the model."""
        ...

    async def measure(self, spec: ModelSpec, report: OnProgress) -> int:
        """The bytes of weights and KV cache of a model that was fetched."""
        ...

    async def load(self, spec: ModelSpec, report: OnProgress) -> EngineLoop:
        """Load the model and start its engine. The caller closes the engine."""
        ...

    def collect_garbage(self) -> None:
        """Free what is in reference cycles. Called after an unload if the engine still exists: it blocks the loop."""
        ...

    def release_memory(self) -> None:
        """Give the system the freed memory that the process still holds. Called on a thread, after an unload."""
        ...


class ManagedModel(NamedTuple):
    """The state of one model, as input of `decide`. `num_bytes` is None until the model is measured.

    `is_busy`: requests use it; waiting requests do not count. `is_yielding`: it makes room, new requests wait.
    """

    name: str
    num_bytes: int | None
    is_loaded: bool
    is_busy: bool = False
    is_yielding: bool = False
    loaded_since: float = 0.0
    wanted_since: float = math.inf
    last_used: float = 0.0
    idle_unload_seconds: float = 0.0
    is_dismissed: bool = False

    @property
    def expires(self) -> float:
        """The time at which it is unloaded if no request uses it until then; infinity if never."""
        is_idle = not self.is_busy and self.wanted_since == math.inf
        if self.is_loaded and is_idle and self.is_dismissed:
            return -math.inf
        can_expire = self.is_loaded and is_idle and self.idle_unload_seconds > 0
        return self.last_used + self.idle_unload_seconds if can_expire else math.inf


class Load(NamedTuple):
    """Load this model, for which there is room; or measure it, if its size is unknown."""

    name: str


class Unload(NamedTuple):
    """Unload this model. New requests for the `yielding` models wait; it is one of them if it makes room."""

    name: str
    reason: str
    yielding: tuple[str, ...] = ()


class IdleTime(NamedTuple):
    """Do nothing until this time or the next change. The model `blocked` waits for the memory of those `yielding`."""

    until: float
    blocked: str | None = None
    yielding: tuple[str, ...] = ()


def decide(models: Sequence[ManagedModel], budget_bytes: float, now: float) -> Load | Unload | IdleTime:
    """The next action. The model that was wanted first is loaded first, so that small models cannot starve a large one.

    If busy models hold the memory that it needs, some of them yield: their running requests end normally, new ones wait
    until their model is loaded again. So no traffic keeps a model out, and a load serves all requests waiting for it.
    """
    loaded = [model for model in models if model.is_loaded]
    wanted = min(
        (model for model in models if model.wanted_since < math.inf and not model.is_loaded),
        key=lambda model: model.wanted_since,
        default=None,
    )
    missing = 0.0
    if wanted is not None and wanted.num_bytes is not None:
        missing = wanted.num_bytes + sum(model.num_bytes or 0 for model in loaded) - budget_bytes
    going = _choose_yielding(loaded, missing)
    yielding = tuple(model.name for model in going)
    expired = next((model for model in loaded if model.expires <= now), None)
    if expired is not None:
        reason = "asked for" if expired.is_dismissed else f"not asked for in {expired.idle_unload_seconds:g} seconds"
        return Unload(expired.name, reason, yielding)
    wake = min((model.expires for model in loaded), default=math.inf)
    if wanted is None:
        return IdleTime(wake)
    if missing <= 0:
        return Load(wanted.name)
    if any(model.is_busy for model in going):
        return IdleTime(wake, wanted.name, yielding)  # wait until all are idle: only all together make room
    oldest = min(going, key=lambda model: model.last_used)
    return Unload(oldest.name, f"making room for {wanted.name}", yielding)


def _choose_yielding(loaded: Sequence[ManagedModel], missing: float) -> list[ManagedModel]:
    """The models that free `missing` bytes: first those already yielding, then idle ones, then the longest loaded."""

    def rank(model: ManagedModel) -> tuple[bool, bool, float]:
        return not model.is_yielding, model.is_busy, model.loaded_since if model.is_busy else model.last_used

    going: list[ManagedModel] = []
    for model in sorted(loaded, key=rank):
        if missing > sum(each.num_bytes or 0 for each in going):
            going.append(model)
    for model in list(going):  # a large model added last may be enough without this one
        if missing <= sum(each.num_bytes or 0 for each in going if each is not model):
            going.remove(model)
    return going


class ModelManager:
    """Loads and unloads models. `async with ModelManager(…)` closes all engines that it loaded."""

    def __init__(
        self,
        models: Iterable[ServedModel],
        loader: Loader,
        config: EngineConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = {model.name: model for model in models}
        self._loader = loader
        self._config = config
        self._clock = clock
        self._budget_bytes = config.memory_gib * GIB or math.inf
        self._sizes: dict[str, int] = {}
        self._engines: dict[str, EngineLoop] = {}  # all engines that are not closed
        self._changed = asyncio.Event()
        self._lost: list[str] = []
        self._starting: dict[str, float] = {}  # since when each model of load = "start" is to be loaded (again)
        self._first_loads: dict[str, asyncio.Future[None]] = {}  # those that `start` waits for
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._fetched: set[str] = set()
        self._downloads = asyncio.Semaphore(config.max_downloads)  # first come, first served
        self._failure: BrliteError | None = None
        self._has_failed = asyncio.Event()
        self._keeping: asyncio.Task[None] | None = None
        for model in self._models.values():
            model.watch(self._changed.set)

    async def start(self) -> None:
        """Wait until the models of `load = "start"` are loaded, one by one, so that memory peaks once.

        Raises the error of a model that cannot be loaded, and `ConfigError` if the memory is not enough; if the sizes
        are known, before anything is loaded. An error ends the other loads and downloads.
        """
        await self._measure_local()
        loop = asyncio.get_running_loop()
        for model in [model for model in self._models.values() if model.spec.load == "start"]:
            self._starting[model.name] = self._clock()
            self._first_loads[model.name] = loop.create_future()
        first_loads = asyncio.gather(*self._first_loads.values())
        self._keeping = asyncio.create_task(self._keep(), name="brlite-model-manager")
        self._keeping.add_done_callback(self._on_stopped)
        try:
            await first_loads
        except BaseException:
            self.drain()
            raise

    async def failure(self) -> BrliteError:
        """Return the error for which the server has to exit, once there is one."""
        await self._has_failed.wait()
        assert self._failure is not None
        return self._failure

    def drain(self) -> None:
        """Start no more loads and refuse the requests that wait for one. Loaded models continue."""
        if self._keeping is not None:
            self._keeping.cancel()
        for waited_for in (*self._fetching.values(), *self._first_loads.values()):
            waited_for.cancel()
        self._first_loads.clear()
        for model in self._models.values():
            model.loading.refuse()

    async def close(self) -> None:
        """Close all engines. Running requests end with an error. May be called twice."""
        self.drain()
        if self._keeping is not None:
            await asyncio.wait([self._keeping, *self._fetching.values()])
        for engine in list(self._engines.values()):
            await engine.close()

    async def __aenter__(self) -> ModelManager:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _keep(self) -> None:
        while True:
            self._changed.clear()
            while self._lost:  # reload a model of load = "start"; unload any other until it is used
                lost = self._models[self._lost.pop()]
                if lost.name not in self._engines:
                    continue  # it was lost as it was unloaded
                comes_back = lost.spec.load == "start"
                if comes_back:
                    self._starting[lost.name] = self._clock()
                await self._unload(lost, "what computes it is gone", comes_back=comes_back)
            for model in self._models.values():
                if self._wanted_since(model) == math.inf or model.name in self._engines:
                    self._fetched.discard(model.name)  # its files may be gone when it is loaded again
                elif model.name not in self._fetching and model.name not in self._fetched:
                    self._fetching[model.name] = asyncio.create_task(self._fetch(model), name="brlite-fetch")
            managed = [self._managed(model) for model in self._models.values()]
            action = decide(managed, self._budget_bytes, self._clock())
            yielding = () if isinstance(action, Load) else action.yielding
            for model in self._models.values():
                model.hold_back(YIELDING if model.name in yielding else None)
            if isinstance(action, Load):
                await self._try_load(self._models[action.name])
            elif isinstance(action, Unload):
                await self._unload(self._models[action.name], action.reason)
            else:
                if action.blocked is not None:
                    self._models[action.blocked].loading.report(BLOCKED, 0.0)
                seconds = None if action.until == math.inf else action.until - self._clock()
                with suppress(asyncio.TimeoutError):
                    await within(seconds, self._changed.wait())

    def _on_stopped(self, task: asyncio.Task[None]) -> None:
        """The task that loads and unloads models has ended. If it failed, the server has to exit."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.critical("the model manager failed", exc_info=error)
            self._fail(f"the model manager failed: {error}")
            for name in list(self._first_loads):
                self._end_first_load(name, error)

    def _end_first_load(self, name: str, error: BaseException | None = None) -> bool:
        """Tell `start` how a load ended that it waits for. False if it does not wait for this model's."""
        first_load = self._first_loads.pop(name, None)
        if first_load is None:
            return False
        if first_load.cancelled():  # so was `start`, a moment ago
            return True
        first_load.set_result(None) if error is None else first_load.set_exception(error)
        return True

    def _managed(self, model: ServedModel) -> ManagedModel:
        can_be_loaded = model.name in self._fetched or model.name in self._engines
        return ManagedModel(
            model.name,
            self._sizes.get(model.name),
            is_loaded=model.name in self._engines,
            is_busy=model.num_active > 0,
            is_yielding=model.is_held_back,
            loaded_since=model.loaded_since,
            wanted_since=self._wanted_since(model) if can_be_loaded else math.inf,
            last_used=model.last_used,
            idle_unload_seconds=model.spec.idle_unload_seconds,
            is_dismissed=model.is_dismissed,
        )

    def _wanted_since(self, model: ServedModel) -> float:
        """The time since which the model is to be loaded; infinity if it is not."""
        return min(model.loading.wanted_since, self._starting.get(model.name, math.inf))

    async def _fetch(self, model: ServedModel) -> None:
        try:
            with model.loading.running():
                if await self._loader.is_here(model.spec) or await self._download(model):
                    self._fetched.add(model.name)
        except Exception as error:
            self._note_failed_load(model, error)
        finally:
            del self._fetching[model.name]
            self._changed.set()

    async def _download(self, model: ServedModel) -> bool:
        """Download a model in its turn. False if it is not to be loaded any more when its turn comes."""
        if self._downloads.locked():
            text = "model %s waits for its turn to be downloaded: at most %d at once (engine.max_downloads)"
            logger.info(text, model.name, self._config.max_downloads)
            model.loading.report(QUEUED, 0.0)
        async with self._downloads:
            if self._wanted_since(model) == math.inf:
                logger.info("model %s is not downloaded: no request waits for it any more", model.name)
                model.loading.report("waiting", 0.0)
                return False
            model.loading.report(ASKING, 0.0)
            await self._loader.fetch(model.spec, model.loading.report)
        return True

    async def _try_load(self, model: ServedModel) -> None:
        """Load a model that requests wait for. If its size is unknown, only measure it; `decide` then runs again."""
        try:
            with model.loading.running():
                if model.name in self._sizes:
                    await self._load(model)
                else:
                    self._note_size(model, await self._loader.measure(model.spec, model.loading.report))
        except Exception as error:
            self._note_failed_load(model, error)

    def _note_failed_load(self, model: ServedModel, error: Exception) -> None:
        """Refuse the requests that wait for the model, after any error: the others are served on."""
        self._fetched.discard(model.name)
        was_starting = self._starting.pop(model.name, None) is not None
        if self._end_first_load(model.name, error):
            return
        is_foreseen = isinstance(error, BrliteError)
        logger.error("model %s could not be loaded: %s", model.name, error, exc_info=not is_foreseen)
        model.loading.fail()
        if was_starting:
            self._fail(f"model {model.name} could not be restarted: {error}")

    async def _load(self, model: ServedModel) -> None:
        started = self._clock()
        engine = await self._loader.load(model.spec, model.loading.report)
        self._engines[model.name] = engine
        engine.watch(lambda: self._note_lost(model, engine))
        self._starting.pop(model.name, None)
        model.take(engine)
        self._end_first_load(model.name)
        logger.info("model %s is ready on %s after %.1f s", model.name, engine.info.device, self._clock() - started)

    def _note_lost(self, model: ServedModel, engine: EngineLoop) -> None:
        """Note that a model's engine has stopped and its requests have ended. While it is unloaded, that is no loss."""
        is_unwanted = model.engine is not engine or (model.is_dismissed and not model.num_active)
        if self._config.on_rank_failure == "exit" and not is_unwanted:
            self._fail(f'model {model.name} is lost, and engine.on_rank_failure is "exit"')
        else:
            self._lost.append(model.name)
            self._changed.set()

    def _fail(self, reason: str) -> None:
        self._failure = EngineError(reason)
        self._has_failed.set()

    async def _unload(self, model: ServedModel, reason: str, *, comes_back: bool = False) -> None:
        """Close a model's engine. Its memory counts as used until then. Cancelling the call does not stop the close."""
        model.give_up(comes_back=comes_back)
        try:
            await self._engines[model.name].close()
        except Exception:  # the engine is gone even if closing it failed
            logger.exception("model %s was not closed in good order", model.name)
        closed = weakref.ref(self._engines.pop(model.name))
        if closed() is not None:  # an error that ended a request refers to it, or an engine plugin
            self._loader.collect_garbage()
        await asyncio.to_thread(self._loader.release_memory)
        logger.info("model %s is unloaded: %s", model.name, reason)

    async def _measure_local(self) -> None:
        """Measure local models, so that most configs that cannot fit are refused before anything is loaded."""
        if self._budget_bytes == math.inf:
            self._sizes = dict.fromkeys(self._models, 0)
        for model in [model for model in self._models.values() if model.name not in self._sizes]:
            try:
                num_bytes = await self._loader.known_bytes(model.spec)
            except (BrliteError, OSError) as error:  # the second for a drive that is lost
                if model.spec.load == "start":
                    raise
                logger.warning("model %s cannot be loaded as it is: %s", model.name, error)
                continue
            if num_bytes is not None:
                self._note_size(model, num_bytes)

    def _note_size(self, model: ServedModel, num_bytes: int) -> None:
        """Store a model's size. Raises `ConfigError` for a model that can never fit."""
        sizes = {**self._sizes, model.name: num_bytes}
        check_memory(self._config, [each.spec for each in self._models.values()], sizes)
        self._sizes = sizes
