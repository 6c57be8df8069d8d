"""The models of this server by name, each with its engine while it is loaded. Does not load models.

`model_manager.py` decides which models are loaded. Each request is counted here under the model that it uses.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches  # here: the import reads files, which the loop's thread must not wait for
from typing import Protocol

from brlite.config.options import ModelSpec, ProxyConfig
from brlite.engine.async_engine import EngineLoop
from brlite.engine.stats import EngineStats
from brlite.errors import ModelNotFound
from brlite.server.load_state import LoadPhase, LoadState

MOST_COUNTED_TOKENS = 131_072  # upper bound of length histograms made before the model's context length is known


class ServedModel:
    """One model under its name.

    While it is not loaded: requests wait if `is_on_demand`, else they are refused.
    """

    def __init__(
        self, spec: ModelSpec, engine: EngineLoop | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.spec = spec
        self.name = spec.name
        # None if the model's own context length is used and the model has not been loaded yet.
        self.max_model_len = engine.info.max_model_len if engine else spec.build_seq or None
        self.created = int(time.time())
        self.engine = engine
        # Shared by all its engines over time, so that counters never decrease.
        self.stats = engine.stats if engine else EngineStats(self.max_model_len or MOST_COUNTED_TOKENS)
        self.loading = LoadState(spec.name, clock)
        self.is_on_demand = spec.load == "on_demand"
        self.is_held_back = False  # new requests wait, although it is loaded
        self.is_dismissed = False  # it is to be unloaded as soon as no request uses it
        self.num_requests = 0
        self.last_used = 0.0
        self.loaded_since = 0.0
        self.num_loads = int(engine is not None)
        self.num_unloads = 0
        self._clock = clock
        self._on_change: Callable[[], None] = lambda: None

    @property
    def is_alive(self) -> bool:
        """False after the engine's loop has failed: only a restart of the process helps."""
        return self.engine is None or self.engine.is_running

    @property
    def is_available(self) -> bool:
        """Whether a new request gets the engine without waiting."""
        return self.engine is not None and not self.is_held_back

    @property
    def num_active(self) -> int:
        """The number of requests that use the engine: all except those waiting for the load."""
        return self.num_requests - self.loading.num_waiting

    @property
    def takes_requests(self) -> bool:
        """Whether a new request is accepted, at once or after a load."""
        return self.is_on_demand if self.engine is None else self.engine.is_running

    @property
    def status(self) -> str:
        if self.engine is not None:
            return "ready" if self.engine.is_running else "failed"
        if self.loading.phase is LoadPhase.RUNNING or not self.is_on_demand:
            return "loading"
        return "failed" if self.loading.phase is LoadPhase.FAILED else "unloaded"

    def watch(self, on_change: Callable[[], None]) -> None:
        """Call `on_change` when a request starts or stops waiting for the model, and when the last active one ends."""
        self._on_change = on_change
        self.loading.watch(on_change)

    @contextmanager
    def in_use(self, max_waiting: int, tenant: str = "") -> Iterator[None]:
        """Keep the model loaded inside the block. Raises `NotReady` or `QueueFull` if the request cannot wait."""
        if self.engine is None or self.is_held_back:
            if self.engine is None and not self.is_on_demand:
                raise self.loading.not_ready("is loading")
            self.loading.check(max_waiting, tenant)
        self.num_requests += 1
        try:
            yield
        finally:
            self.num_requests -= 1
            self.last_used = self._clock()
            if not self.num_active:
                self._on_change()

    async def loaded(self, max_wait_seconds: float, tenant: str = "") -> EngineLoop:
        """Wait for the engine. Call it inside `in_use`. Raises `NotReady` if the load fails or takes too long."""
        if not self.is_available:
            await self.loading.wait(max_wait_seconds, tenant)  # from here on this request is active
        if self.engine is None:  # lost since the end of its load
            raise self.loading.not_ready("is not loaded any more")
        return self.engine

    def take(self, engine: EngineLoop) -> None:
        """Set the engine and wake the requests that wait for it."""
        engine.continue_stats(self.stats)
        self.max_model_len = engine.info.max_model_len
        self.engine = engine
        self.is_on_demand = True  # should it be unloaded again
        self.last_used = self.loaded_since = self._clock()
        self.is_held_back = False
        self.num_loads += 1
        self.loading.succeed()

    def hold_back(self, reason: str | None) -> None:
        """Make new requests wait although the model is loaded; None ends that. No effect while it is unloaded."""
        was_held_back, self.is_held_back = self.is_held_back, reason is not None and self.engine is not None
        if reason is not None and self.is_held_back:
            self.loading.report(reason, 0.0)
        elif was_held_back and self.engine is not None:
            self.loading.succeed()

    def dismiss(self) -> None:
        """Mark the model to be unloaded by the model manager when idle. No effect while it is unloaded."""
        self.is_dismissed = self.engine is not None
        self._on_change()

    def keep(self) -> None:
        """Undo a `dismiss` while the model is still loaded."""
        self.is_dismissed = False

    def give_up(self, *, comes_back: bool) -> None:
        """Drop the engine, which the model manager closes.

        With `comes_back` the manager reloads the model, and requests are refused until then. Else the next request
        starts the load.
        """
        self.engine = None
        self.is_dismissed = False
        self.is_on_demand = not comes_back
        self.num_unloads += 1


class RemoteModel(Protocol):
    """A model of other servers under a name that requests may use."""

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> str:
        """The name that keys' rules use: `name`, or if that is an alias, the name behind it."""

    @property
    def num_upstreams(self) -> int: ...

    @property
    def num_available(self) -> int:
        """How many of its upstreams are reachable now."""

    @property
    def created(self) -> int: ...

    @property
    def owned_by(self) -> str | None: ...

    @property
    def max_model_len(self) -> int | None: ...


class ModelTable:
    """The names and aliases of local models. While `is_draining`, new requests are refused.

    Iterating `forwarded` gives the current models of other servers.
    """

    def __init__(self, models: Iterable[ServedModel], proxy: ProxyConfig | None = None) -> None:
        self._models = {model.name: model for model in models}
        self.take_names(proxy or ProxyConfig())
        self.forwarded: Iterable[RemoteModel] = ()
        self.is_draining = False

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    @property
    def takes_requests(self) -> bool:
        """Whether all local models accept requests or, without local models, at least one remote model does."""
        if self.is_draining:
            return False
        if self._models:
            return all(model.takes_requests for model in self)
        return any(model.num_available for model in self.forwarded)

    @property
    def status(self) -> str:
        if self.is_draining:
            return "stopping"
        if self.takes_requests:
            return "ready"
        return "loading" if self._models else "unreachable"

    def find_forwarded(self, name: str) -> RemoteModel | None:
        """The remote model of this name. None if there is none."""
        return next((model for model in self.forwarded if model.name == name), None)

    def take_names(self, config: ProxyConfig) -> None:
        """Replace the aliases and the names of remote models by those of this config."""
        self._remote_names = frozenset(config.all_models.values())
        self._aliases = {alias: name for alias, name in config.aliases.items() if name in self._models}

    def names(self) -> Iterator[tuple[str, ServedModel]]:
        """The names and aliases of local models, each with its model."""
        yield from self._models.items()
        yield from ((alias, self._models[name]) for alias, name in self._aliases.items())

    def get(self, name: str | None) -> ServedModel | None:
        """The model of that name or alias, None if there is none. The name may be None if only one model is served."""
        if not name and len(self._models) == 1:
            return next(iter(self._models.values()))
        return self._models.get(self._aliases.get(name or "", name or ""))

    def find(self, name: str | None) -> ServedModel:
        """Like `get`, but raises `ModelNotFound` in place of None. The error names all models: for operators only."""
        model = self.get(name)
        if model is None:
            raise self.unknown(name, lambda _: True)
        return model

    def unknown(self, name: str | None, may_use: Callable[[str], bool]) -> ModelNotFound:
        """The error for a name that no model has. It names the models that the key may use."""
        text = "say which model: several are served here"
        if name:
            is_remote = name in self._remote_names
            where = "runs on another server, whose address is not known here" if is_remote else "does not exist"
            local = (shown for shown, model in self.names() if may_use(model.name))
            names = [*local, *(model.name for model in self.forwarded if may_use(model.model))]
            near = get_close_matches(name[:200], names, 1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            served = ", ".join(names) or "none that this key may use"
            text = f"The model `{name[:200]}` {where}.{hint} Served here: {served}"
        return ModelNotFound(text, param="model", code="model_not_found")
