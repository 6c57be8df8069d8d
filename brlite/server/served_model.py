"""The models of this server by name, each loading, ready or failed. Knows nothing of how a model is loaded."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from brlite.config import ModelSpec, ProxyConfig
from brlite.engine.async_engine import AsyncEngine
from brlite.engine.stats import EngineStats
from brlite.errors import ModelNotFound, NotReady

LOADING_RETRY_SECONDS = 5


class ServedModel:
    """One model under its name. `stage` and `fraction` (0 to 1) say how far its loading has come."""

    def __init__(self, spec: ModelSpec, engine: AsyncEngine | None = None) -> None:
        self.name = spec.name
        self.max_model_len = engine.info.max_model_len if engine else spec.build_seq
        self.created = int(time.time())
        self.engine = engine
        self.stage = "waiting"
        self.fraction = 0.0
        self._no_stats = EngineStats(self.max_model_len)

    @property
    def stats(self) -> EngineStats:
        """The engine's numbers, all zero while there is no engine."""
        return self.engine.stats if self.engine else self._no_stats

    def report(self, stage: str, fraction: float) -> None:
        """Note how far loading is."""
        self.stage, self.fraction = stage, fraction

    @property
    def is_alive(self) -> bool:
        """False once the engine's loop has died: nothing but a restart helps then."""
        return self.engine is None or self.engine.is_running

    @property
    def status(self) -> str:
        if self.engine is None:
            return "loading"
        return "ready" if self.engine.is_running else "failed"

    def ready_engine(self) -> AsyncEngine:
        """The engine, or `NotReady` with how far it is."""
        if self.engine is None:
            progress = f"{self.stage}, {self.fraction:.0%}"
            raise NotReady(f"the model {self.name} is loading: {progress}", retry_after_seconds=LOADING_RETRY_SECONDS)
        return self.engine


class ModelTable:
    """Which names lead to a model here. `is_draining` closes the door to new work."""

    def __init__(self, models: Iterable[ServedModel], elsewhere: ProxyConfig | None = None) -> None:
        self._models = {model.name: model for model in models}
        self._elsewhere = frozenset((elsewhere or ProxyConfig()).all_models.values())
        self.is_draining = False

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def find(self, name: str | None) -> ServedModel:
        """The model of that name; no name is enough where one model is served. Raises `ModelNotFound`."""
        if name is None and len(self._models) == 1:
            return next(iter(self._models.values()))
        model = self._models.get(name or "")
        if model is None:
            raise ModelNotFound(self._unknown(name), param="model", code="model_not_found")
        return model

    def engine(self, name: str | None) -> AsyncEngine:
        """The engine to give new work to. Raises `ModelNotFound`, or `NotReady` while loading or draining."""
        model = self.find(name)
        if self.is_draining:
            raise NotReady("the server is stopping", retry_after_seconds=LOADING_RETRY_SECONDS)
        return model.ready_engine()

    def _unknown(self, name: str | None) -> str:
        if name is None:
            return "say which model: several are served here"
        where = (
            "runs on another server; requests are not forwarded yet" if name in self._elsewhere else "does not exist"
        )
        return f"The model `{name[:200]}` {where}. Served here: {', '.join(self._models)}"
