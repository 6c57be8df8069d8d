"""The benches' tiny checkpoints as torch tensors, and as a checkpoint in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.measuring.tiny_models import (
    BAICHUAN,
    CHATGLM,
    LLAMA,
    LLAMA3,
    MISTRAL,
    PHI3,
    QWEN2,
    QWEN3,
    SMOLLM3,
    TINY_CONFIGS,
    VOCAB_SIZE,
    YARN,
    random_arrays,
    write_byte_tokenizer,
    write_model,
)
from brlite.checkpoint.stored_tensor import F32, StoredTensor, tensor_in_memory
from brlite.models.registry import find_family

if TYPE_CHECKING:
    import torch

__all__ = [
    "BAICHUAN",
    "CHATGLM",
    "LLAMA",
    "LLAMA3",
    "MISTRAL",
    "NETWORKS",
    "PHI3",
    "QWEN2",
    "QWEN3",
    "SMOLLM3",
    "TINY_CONFIGS",
    "VOCAB_SIZE",
    "YARN",
    "TensorCheckpoint",
    "random_arrays",
    "random_tensors",
    "tiny_tensors",
    "write_byte_tokenizer",
    "write_model",
    "write_tiny_model",
]


def _kind_of_network(name: str) -> tuple[str, bool]:
    config = find_family(TINY_CONFIGS[name]).read_config(TINY_CONFIGS[name])
    return TINY_CONFIGS[name]["model_type"], any(config.window(layer) for layer in range(config.num_layers))


# The first tiny model of each family without and with a sliding window: for what takes too long with all of them.
NETWORKS = tuple({_kind_of_network(name): name for name in reversed(TINY_CONFIGS)}.values())


def tiny_tensors(name: str, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of the tiny model, by its name in a checkpoint."""
    return random_tensors(TINY_CONFIGS[name], seed=seed)


def random_tensors(config: dict[str, Any], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """The same numbers as `random_arrays`, for tests that need torch in any case."""
    import torch

    return {name: torch.from_numpy(array) for name, array in random_arrays(config, seed=seed).items()}


def write_tiny_model(path: Path, name: str = "llama", *, seed: int = 0) -> Path:
    """Write `config.json` and `model.safetensors` into the folder `path` and return it."""
    return write_model(path, TINY_CONFIGS[name], seed=seed)


class TensorCheckpoint:
    """A checkpoint in memory: what `open_checkpoint` would have read from a folder."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        self.path = Path("tiny")
        self.identity = "tiny"
        self.config = config
        self._tensors = tensors

    @classmethod
    def tiny(cls, name: str = "llama", *, seed: int = 0) -> TensorCheckpoint:
        return cls(TINY_CONFIGS[name], tiny_tensors(name, seed=seed))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def formats(self) -> dict[str, str]:
        return dict.fromkeys(self._tensors, F32.name)

    def tensors(self) -> Iterator[StoredTensor]:
        for name, tensor in self._tensors.items():
            values = tensor.float().contiguous().numpy().reshape(-1).view(np.uint8)
            yield tensor_in_memory(name, F32, tuple(tensor.shape), values)
