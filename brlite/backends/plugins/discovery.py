"""Finds an engine by its name, and checks the capabilities that it declares.

The engines of this package are in a table. Only for another name the entry points of the installed packages are read,
which takes 0.1 s and 0.6 MB.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from brlite.backends.plugins.contract import Capabilities, PluginEngine
from brlite.config.options import ModelSpec
from brlite.errors import ConfigError, EngineError

BUILT_IN = {
    "brlite": ("brlite.backends.plugins.builtin", "BuiltinEngine"),
    "suinfer_llm": ("brlite.backends.plugins.suinfer_llm", "SuinferLlm"),
    "toy": ("brlite.backends.plugins.toy", "ToyEngine"),
}
GROUP = "brlite.engines"  # the entry points of other packages
MAX_TOLERANCE = 0.1


def make_engine(name: str) -> PluginEngine:
    """A new engine of that name, not yet open. Raises `ConfigError` where there is none, or it cannot be imported."""
    where, load = _find(name)
    try:
        make = load()
    except (ImportError, AttributeError, OSError) as error:  # OSError: a shared library that fails to load
        raise ConfigError(f"engine {name} ({where}) cannot be imported: {error}") from error
    return make()


def check_engine_name(name: str) -> None:
    """Raise `ConfigError` where no engine of that name is installed. Imports none."""
    _find(name)


def check_capabilities(capabilities: Capabilities, spec: ModelSpec) -> None:
    """Raise `EngineError` if capabilities contradict each other, `ConfigError` if they do not match `spec`."""
    name = f"engine {capabilities.name}"
    for field in ("max_seqs", "max_model_len", "vocab_size", "longest_row"):
        if getattr(capabilities, field) < 1:
            raise EngineError(f"{name}: {field} = {getattr(capabilities, field)}; allowed is 1 or more")
    if not 0 <= capabilities.tolerance <= MAX_TOLERANCE:
        raise EngineError(f"{name}: tolerance = {capabilities.tolerance}; allowed is 0 to {MAX_TOLERANCE}")
    if capabilities.longest_row < capabilities.max_model_len and not capabilities.can_chunk_prompts:
        raise EngineError(f"{name}: max_row_tokens = {capabilities.max_row_tokens} needs can_chunk_prompts")
    if capabilities.hidden_size and not capabilities.can_chunk_prompts:
        raise EngineError(f"{name}: hidden_size = {capabilities.hidden_size} needs can_chunk_prompts")
    if spec.vocab_size not in (None, capabilities.vocab_size):
        raise ConfigError(f"vocab_size is {spec.vocab_size}; {name} gives {capabilities.vocab_size} logits")


def _find(name: str) -> tuple[str, Callable[[], Callable[[], PluginEngine]]]:
    """Where the engine's class is, and a function that imports it. Raises `ConfigError` where there is none."""
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name]
        return f"{module}:{attribute}", lambda: getattr(import_module(module), attribute)
    from importlib.metadata import entry_points

    engines = {point.name: point for point in entry_points(group=GROUP)}
    if name not in engines:
        known = ", ".join(sorted({*BUILT_IN, *engines}))
        raise ConfigError(f"there is no engine {name!r}; installed are {known}")
    return engines[name].value, engines[name].load
