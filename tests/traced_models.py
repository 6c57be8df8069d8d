"""Traced `.pt` files of tiny models, as the manual's conversion makes them: torch.jit.trace, with Hugging Face's names.

Only the embedding and the head compute; all other tensors are there with their names and are never used.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Returns = Literal["dict", "tuple", "tensor"]

EMBEDDINGS = ("model.embed_tokens.weight", "transformer.embedding.word_embeddings.weight")
HEADS = ("lm_head.weight", "transformer.output_layer.weight")


class Holder(nn.Module):
    """A module that has parameters and no use for them."""

    def hold(self, name: str, tensor: Tensor) -> None:
        first, _, rest = name.partition(".")
        if not rest:
            self.register_parameter(first, nn.Parameter(tensor, requires_grad=False))
            return
        if first not in self._modules:
            self.add_module(first, Holder())
        below = self.get_submodule(first)
        assert isinstance(below, Holder)
        below.hold(rest, tensor)


class Body(Holder):
    """Looks tokens up."""

    def forward(self, input_ids: Tensor) -> Tensor:
        name = "embed_tokens" if "embed_tokens" in self._modules else "embedding.word_embeddings"
        return functional.embedding(input_ids, self.get_submodule(name).weight)


class Head(Holder):
    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.weight)


class TinyForCausalLM(Holder):
    """Calls its body and its head as Hugging Face's models do, and returns what they return."""

    def __init__(self, tensors: Mapping[str, Tensor], returns: Returns) -> None:
        super().__init__()
        self._returns = returns
        top = next(name for name in EMBEDDINGS if name in tensors).partition(".")[0]
        self.add_module(top, Body())
        self._top = top
        self._has_head = HEADS[0] in tensors
        if self._has_head:
            self.add_module("lm_head", Head())
        for name, tensor in tensors.items():
            self.hold(name, tensor)
        self.get_submodule(top).register_buffer("inv_freq", torch.ones(4), persistent=False)
        self.get_submodule(top).register_buffer("mask", torch.ones(4, dtype=torch.bool))

    def forward(self, input_ids: Tensor) -> object:
        logits = self.get_submodule(self._top)(input_ids)
        logits = (self.lm_head(logits) if self._has_head else logits).float()
        return {"dict": {"logits": logits}, "tuple": (logits,), "tensor": logits}[self._returns]


def write_traced(
    file: Path, tensors: Mapping[str, Tensor], returns: Returns = "dict", dtype: torch.dtype = torch.float32
) -> Path:
    """Trace and save, as the manual's `model_convert.py` does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that tracing is old
        module = TinyForCausalLM({name: tensor.to(dtype) for name, tensor in tensors.items()}, returns).eval()
        traced = torch.jit.trace(module, torch.arange(1, 10)[None], strict=False, check_trace=False)
        torch.jit.save(traced, str(file))
    return file


def loaded_input_name(file: Path) -> str:
    """The name of a saved graph's input, as TorchScript itself gives it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name: str = list(torch.jit.load(str(file)).inlined_graph.inputs())[1].debugName()
    return name
