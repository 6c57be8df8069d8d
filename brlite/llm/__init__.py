"""Composes a model of tokenizer, engine and backend. First file: `loading.py`.

`LLM` is offline inference without an event loop; `AsyncEngine` runs on the event loop of its caller.
"""

from brlite.llm.loading import Assembly, build_engine
from brlite.llm.offline import LLM
from brlite.llm.serving import AsyncEngine, EngineLoader, fetch_model, is_model_here, model_bytes

__all__ = [
    "LLM",
    "Assembly",
    "AsyncEngine",
    "EngineLoader",
    "build_engine",
    "fetch_model",
    "is_model_here",
    "model_bytes",
]
