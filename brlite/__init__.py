"""brlite: a compact asyncio server for large language models.

The names below are imported when they are first used, so that `import brlite` costs nothing and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from brlite.app import create_app
    from brlite.config.load import load_config
    from brlite.config.options import Config
    from brlite.engine.outputs import RequestOutput
    from brlite.llm import LLM, AsyncEngine
    from brlite.sampling_params import PoolingParams, SamplingParams, StructuredOutput

__version__ = "0.2.0"
__all__ = [
    "LLM",
    "AsyncEngine",
    "Config",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutput",
    "create_app",
    "load_config",
]

_HOMES = {
    "LLM": "brlite.llm",
    "AsyncEngine": "brlite.llm",
    "Config": "brlite.config.options",
    "load_config": "brlite.config.load",
    "RequestOutput": "brlite.engine.outputs",
    "PoolingParams": "brlite.sampling_params",
    "SamplingParams": "brlite.sampling_params",
    "StructuredOutput": "brlite.sampling_params",
    "create_app": "brlite.app",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'brlite' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
