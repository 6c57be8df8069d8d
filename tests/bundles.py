"""Makes bundles of tiny models, without the command around it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from brlite.checkpoint import Checkpoint, open_checkpoint
from brlite.checkpoint.bundle import FORMAT, FORMAT_VERSION, Manifest
from brlite.checkpoint.checked_model import check_model
from brlite.config.options import ModelSpec
from brlite.conversion.bundle_writer import BundlePlan, plan_packing, plan_weights, write_bundle
from brlite.conversion.convert import read_side_files
from brlite.conversion.safetensors_writer import OnBytes
from brlite.models.network import num_parameters
from brlite.models.precision import PRECISIONS, PrecisionName

INT8: PrecisionName = "a_bf16_w_int8_kv_int8"
SHARD_BYTES = 40_000  # a tiny model is several shards


def plan_bundle(
    checkpoint: Checkpoint, folder: Path, library: ctypes.CDLL | None, precision: PrecisionName = INT8, **draft: Any
) -> BundlePlan:
    model = check_model(checkpoint, ModelSpec(name="tiny", build_seq=1))
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "brlite": "test",
        "model": "tiny",
        "architecture": "test",
        "precision": precision,
        "num_parameters": num_parameters(model.config),
        "vocab_size": model.config.vocab_size,
        "input_name": "input_ids.1",
        "output_name": "logits",
        "source": checkpoint.identity,
        "files": {},
    }
    return BundlePlan(
        folder=folder,
        checkpoint=checkpoint,
        model=model,
        draft=Manifest(**manifest | draft),
        side_files=read_side_files(checkpoint.path, checkpoint.config),
        shards=plan_weights(checkpoint, model, SHARD_BYTES),
        packing=None if library is None else plan_packing(library, model, PRECISIONS[precision]),
    )


def make_bundle(
    source: Path,
    folder: Path,
    library: ctypes.CDLL | None,
    precision: PrecisionName = INT8,
    on_bytes: OnBytes | None = None,
) -> Manifest:
    """Make a bundle of a model's folder in `folder`, in small shards."""
    checkpoint = open_checkpoint(source)
    plan = plan_bundle(checkpoint, folder, library, precision)
    return write_bundle(plan, on_bytes or (lambda num_bytes: None))[0]
