"""Logits processors: Python code that edits the logits of a sequence before each draw.

Callables come with the parameters (offline, embedded). A request names factories, which the operator installs as entry
points and allows in `engine.logits_processors`; nothing else is imported. Backends call them: see `LogitsProcessors`
in `backend.py`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from brlite.engine.backend import LogitsProcessor, LogitsProcessors
from brlite.engine.stats import EngineStats
from brlite.errors import ConfigError, EngineError, InvalidRequest
from brlite.sampling_params import NamedProcessor, SamplingParams
from brlite.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

GROUP = "brlite.logits_processors"
SLOW_SECONDS = 0.01  # of a call; a token of a small model takes about as long
MAX_REASON = 300  # characters of a factory's error that the client gets

Factory = Callable[..., Callable[..., Any]]
Processors = tuple[tuple[LogitsProcessor, ...], ...]  # of each answer of a request


def load_factories(names: Collection[str]) -> dict[str, Factory]:
    """Import the entry points of these names alone. Raises `ConfigError` where one is missing or cannot be imported."""
    if not names:
        return {}
    from importlib.metadata import entry_points  # 0.1 s and 0.6 MB, which a server without processors does not spend

    factories: dict[str, Factory] = {}
    installed = {point.name: point for point in entry_points(group=GROUP)}
    for name in names:
        if name not in installed:
            known = ", ".join(sorted(installed)) or "none"
            raise ConfigError(
                f"engine.logits_processors: there is no entry point {name!r} in {GROUP}; there are {known}"
            )
        try:
            factories[name] = installed[name].load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a module of others may raise anything
            where = f"engine.logits_processors: {name} ({installed[name].value})"
            raise ConfigError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    return factories


class ProcessorMaker:
    """Makes the processors of requests. `factories` are those that requests may name."""

    def __init__(self, factories: Mapping[str, Factory], tokenizer: Tokenizer) -> None:
        self._factories = factories
        self._tokenizer = tokenizer

    def make(self, params: SamplingParams) -> Processors | None:
        """The processors of each of the `n` answers, for `Request.processors`; None without any. For any thread.

        A factory is called once for each answer, as `factory(tokenizer, *args, **kwargs)`. A callable with a method
        `clone` is cloned for each answer, as in vLLM; any other serves them all. Raises `InvalidRequest` for a name
        that is not allowed, and where a factory raises `ValueError` or `TypeError`: its arguments are wrong.
        """
        if not params.logits_processors:
            return None
        for item in params.logits_processors:
            if isinstance(item, NamedProcessor) and item.name not in self._factories:
                allowed = ", ".join(sorted(self._factories))
                which = f"allowed are {allowed}" if allowed else "it allows no logits processors"
                raise InvalidRequest(
                    f"logits_processors: {item.name[:64]!r} is not allowed on this server; {which} "
                    "(engine.logits_processors)",
                    param="logits_processors",
                )
        return tuple([tuple(map(self._make_one, params.logits_processors)) for _ in range(params.n)])

    def _make_one(self, item: NamedProcessor | Callable[..., Any]) -> LogitsProcessor:
        if not isinstance(item, NamedProcessor):
            function = item.clone() if hasattr(item, "clone") else item
            return LogitsProcessor(
                getattr(item, "__qualname__", type(item).__qualname__), function, _num_inputs(function)
            )
        try:
            function = self._factories[item.name](self._tokenizer, *(item.args or ()), **(item.kwargs or {}))
            if not callable(function):
                raise RuntimeError(f"the factory returned {type(function).__name__}, which cannot be called")
        except (ValueError, TypeError) as error:
            text = str(error)
            if len(text) > MAX_REASON:
                text = f"{text[:MAX_REASON]}… (the first {MAX_REASON} of {len(text)} characters)"
            raise InvalidRequest(f"logits_processors: {item.name}: {text}", param="logits_processors") from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a `CancelledError` of the factory would end the client's connection
            logger.exception("the factory of the logits processor %s failed", item.name)
            raise EngineError(f"the logits processor {item.name} could not be made") from error
        return LogitsProcessor(item.name, function, _num_inputs(function))


class ProcessorTimes:
    """Counts the calls of a step and their time, and logs each processor the first time that it is slow."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def note(self, processors: Iterable[LogitsProcessors], stats: EngineStats) -> float:
        """Add the calls of a step, one `LogitsProcessors` for each sequence, to `stats`. Returns their seconds."""
        calls = [call for each in processors for call in each.seconds]
        total = sum(seconds for _, seconds in calls)
        stats.logits_processor_calls += len(calls)
        stats.logits_processor_seconds += total
        for name, seconds in calls:
            if seconds > SLOW_SECONDS and name not in self._logged:
                self._logged.add(name)
                logger.warning(
                    "a call of the logits processor %s took %.0f ms; all requests of the step waited for it",
                    name,
                    1000 * seconds,
                )
        return total


def _num_inputs(function: Callable[..., Any]) -> int:
    """3 for a processor that gets the prompt, too: vLLM's rule (its `model_executor/layers/logits_processor.py`)."""
    try:
        return len(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # not callable, or a function in C
        return 2
