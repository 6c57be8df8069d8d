"""Ranks as a pass over the plain model: each computes with its part of the parameters, and here they meet.

Four meetings: the embedding is summed (all but one rank look up zeros), so are what `o` and `down` give, and the
logits' columns are joined. Which part is whose stands in `models/shards.py`; how ranks talk is the group's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from brlite.backends.torch.parameters import Linear, Parameters
from brlite.models.config import ModelConfig
from brlite.models.network import build_network
from brlite.models.shards import Shard, vocabulary_range


class Group(Protocol):
    """What the ranks of a model do together. All must call the same, in the same order, with tensors of one shape."""

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by the sum of all ranks', added in the order of the ranks; return it."""
        ...

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """All ranks' tensors, in the order of the ranks."""
        ...


@dataclass(frozen=True, kw_only=True)
class SummedLinear(Linear):
    """A matrix whose columns the ranks share: the product is the sum of theirs, added up in float32."""

    own: Linear
    group: Group

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.sum_(self.own(x).float())


@dataclass(frozen=True, kw_only=True)
class JoinedHead(Linear):
    """A head whose rows the ranks share, padded to one size: each has the logits of some tokens, in order."""

    own: Linear
    group: Group
    num_rows: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return self.join(self.own(x).contiguous())

    def join(self, own: Tensor) -> Tensor:
        """The logits of all ranks, of this one's."""
        parts = self.group.gather(own)
        return torch.cat([part[:, :size] for part, size in zip(parts, self.num_rows, strict=True)], dim=-1)


@dataclass(frozen=True, kw_only=True)
class SharedParameters(Parameters):
    """One rank's part of a decoder's parameters. `tokens` are those whose embedding it holds."""

    group: Group
    tokens: range

    def look_up(self, token_ids: Tensor) -> Tensor:
        rows = token_ids - self.tokens.start
        is_elsewhere = (rows < 0) | (rows >= len(self.tokens))
        found = functional.embedding(rows.masked_fill(is_elsewhere, 0), self.named["embedding"]).float()
        return self.group.sum_(found.masked_fill_(is_elsewhere.unsqueeze(1), 0))


def shard_parameters(parameters: Parameters, config: ModelConfig, shard: Shard, group: Group) -> SharedParameters:
    """What a rank computes with, made of its part of the parameters. `config` is the whole model's."""
    vocabulary = [vocabulary_range(config, Shard(rank, shard.size)) for rank in range(shard.size)]
    sizes = tuple(len(part) for part in vocabulary)
    linears = dict(parameters.linears)
    for operation in build_network(config).multiplications:
        own = linears[operation.name]
        if operation.output == "hidden":
            linears[operation.name] = SummedLinear(own.weight, own.bias, own=own, group=group)
        elif operation.output == "logits":
            linears[operation.name] = JoinedHead(own.weight, own=own, group=group, num_rows=sizes)
    return SharedParameters(
        parameters.named, linears, parameters.num_packed_bytes, group=group, tokens=vocabulary[shard.rank]
    )
