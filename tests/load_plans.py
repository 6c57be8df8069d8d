"""Load plans as `backends.choose` makes them, and whole checkpoints, for tests that load a model themselves."""

from __future__ import annotations

from typing import Any

from brlite.checkpoint import Checkpoint
from brlite.checkpoint.checked_model import check_model
from brlite.checkpoint.load_plan import LoadPlan
from brlite.checkpoint.stored_tensor import Float32
from brlite.config.options import EngineConfig, ModelSpec


def make_plan(checkpoint: Checkpoint, spec: ModelSpec, engine: EngineConfig | None = None, **fields: Any) -> LoadPlan:
    """The plan for all of a checkpoint, on one thread unless `engine` or `fields` say otherwise."""
    engine = engine or EngineConfig(threads=1)
    settings = {"engine": engine, "num_threads": engine.threads or 1} | fields
    return LoadPlan(checkpoint=checkpoint, model=check_model(checkpoint, spec), spec=spec, **settings)


def read_tensors(checkpoint: Checkpoint) -> dict[str, Float32]:
    """Every tensor of a checkpoint by name, widened to float32."""
    return {tensor.name: tensor.float32() for tensor in checkpoint.tensors()}
