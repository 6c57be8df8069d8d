"""Models of well-known shapes with random weights made on the device: no file is written, none is read.

A backend loads them as it loads any model, from a checkpoint that has names and shapes, so that whatever it does at
loading (probing, packing, capturing) is done. For a card that gives no tensors: they are filled where they are, after.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import shapes
import torch

from brlite.backends.torch.backend import TorchBackend
from brlite.checkpoint.checked_model import check_model
from brlite.checkpoint.load_plan import LoadPlan
from brlite.checkpoint.stored_tensor import F32, StoredTensor, tensor_in_memory
from brlite.config.options import EngineConfig, ModelSpec
from brlite.models.config import ModelConfig
from brlite.models.precision import PrecisionName
from brlite.models.registry import find_family

WEIGHT_SCALE = 0.02
BLOCK_SIZE = 16
# Name → the sizes as in `shapes.SHAPES`, and whether head and embedding are one matrix.
SHAPES: dict[str, tuple[tuple[int, int, int, int, int, int], bool]] = {
    "tiny": ((128, 256, 2, 4, 2, 6000), False),
    "1b": ((2048, 8192, 16, 32, 8, 128256), True),  # Llama 3.2's
    "8b": (shapes.SHAPES["8b"], False),  # Llama 3.1's
}


class RandomCheckpoint:
    """A `Checkpoint` of a shape: what a folder's headers say, and random tensors only where they are wanted."""

    def __init__(self, config: dict[str, Any], *, has_tensors: bool) -> None:
        family = find_family(config)
        targets = family.weight_targets(family.read_config(config))
        self.path = Path("random")
        self.identity = "random"
        self.config = config
        self._shapes = {name: target.shape for name, target in targets.items()}
        self._has_tensors = has_tensors

    @property
    def num_bytes(self) -> int:
        return 2 * sum(math.prod(shape) for shape in self._shapes.values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def formats(self) -> dict[str, str]:
        return dict.fromkeys(self._shapes, F32.name)

    def tensors(self) -> Iterator[StoredTensor]:
        random = np.random.default_rng(0)
        for name, shape in self._shapes.items() if self._has_tensors else ():
            spread = random.standard_normal(shape, np.float32) * WEIGHT_SCALE
            values = np.ones(shape, np.float32) if len(shape) == 1 else spread
            yield tensor_in_memory(name, F32, shape, values.reshape(-1).view(np.uint8))

    def close(self) -> None:
        pass


def hugging_face_config(shape: str) -> dict[str, Any]:
    sizes, is_tied = SHAPES[shape]
    return shapes.llama_config(sizes, rope_theta=500000.0, max_position_embeddings=16384, tie_word_embeddings=is_tied)


def model_config(shape: str) -> ModelConfig:
    config = hugging_face_config(shape)
    return find_family(config).read_config(config)


def kernels() -> list[str]:
    """The values of `engine.torch_kernels` that are worth comparing; one empty name where there is no such option."""
    has_option = "torch_kernels" in {field.name for field in msgspec.structs.fields(EngineConfig)}
    return ["triton", "eager"] if has_option else [""]


def make_backend(
    shape: str, precision: PrecisionName, device: str, kernels: str, *, rows: int, context: int, num_blocks: int
) -> TorchBackend:
    """A backend for so many rows, with a cache of `num_blocks`, that computes with random weights."""
    spec = ModelSpec(
        name="random", path="random", precision=precision, build_seq=context, build_batch=rows, num_blocks=num_blocks
    )
    fields = {"torch_kernels": kernels} if kernels else {}
    engine = msgspec.convert({"backend": "torch", "device": device, "block_size": BLOCK_SIZE, **fields}, EngineConfig)
    is_filled_later = device != "cpu"
    checkpoint = RandomCheckpoint(hugging_face_config(shape), has_tensors=not is_filled_later)
    model = check_model(checkpoint, spec)
    threads = len(os.sched_getaffinity(0))
    backend = TorchBackend.load(
        LoadPlan(checkpoint=checkpoint, model=model, spec=spec, engine=engine, num_threads=threads)
    )
    if is_filled_later:
        _fill(backend)
    return backend


@torch.inference_mode()
def _fill(backend: TorchBackend) -> None:
    """Random weights in place: matrices of a spread that keeps logits finite, norms of ones, int8 with small scales."""
    for name, tensor in backend._steps.parameters.named.items():
        if tensor.dtype in (torch.int8, torch.int32):  # the kernels for cards keep words of four
            tensor.random_(*((-127, 128) if tensor.dtype == torch.int8 else (-(2**31), 2**31)))
        elif name.endswith(".scales"):
            tensor.fill_(WEIGHT_SCALE / 73)  # the spread of uniform numbers to 127 is 73
        elif tensor.dtype == torch.float32 and tensor.dim() == 1:
            tensor.fill_(1.0)
        elif tensor.dim() == 1:
            tensor.zero_()
        else:
            tensor.normal_(0.0, WEIGHT_SCALE)


def write_folder(shape: str, folder: Path, device: str, *, has_weights: bool = True) -> None:
    """The same as a folder that any server loads: random bfloat16 weights from the device, a tokenizer of its size."""
    folder.mkdir(parents=True, exist_ok=True)
    config = hugging_face_config(shape) | {"eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    shapes.write_tokenizer(folder, config["vocab_size"])
    if not has_weights:
        return
    header: dict[str, Any] = {}
    end = 0
    stored = RandomCheckpoint(config, has_tensors=False).shapes()
    for name, sizes in stored.items():
        begin, end = end, end + 2 * math.prod(sizes)
        header[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for sizes in stored.values():
            tensor = torch.empty(sizes, dtype=torch.bfloat16, device=device)
            tensor = tensor.fill_(1.0) if len(sizes) == 1 else tensor.normal_(0.0, WEIGHT_SCALE)
            out.write(tensor.cpu().view(torch.uint8).numpy().tobytes())
