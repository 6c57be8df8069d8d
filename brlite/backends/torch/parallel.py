"""Tensor parallelism as a pass over the plain model: each rank computes with its part of the parameters.

The ranks communicate at four places: the embeddings are summed (all ranks but one look up zeros), the products of `o`
and `down` are summed, and the columns of the logits are joined. `models/shards.py` defines the parts; a `Group`
communicates.
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
    """Communication between the ranks of a model. All must make the same calls in the same order, with equal shapes."""

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by the sum of all ranks', added in the order of the ranks; return it."""
        ...

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """All ranks' tensors, in the order of the ranks."""
        ...


@dataclass(frozen=True, kw_only=True)
class SummedLinear(Linear):
    """A matrix whose columns are divided among the ranks. Their products are summed in float32."""

    own: Linear
    group: Group

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.sum_(self.own(x).float())


@dataclass(frozen=True, kw_only=True)
class JoinedHead(Linear):
    """A head whose rows are divided among the ranks and padded to one size. Each rank has the logits of some tokens."""

    own: Linear
    group: Group
    num_rows: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return self.join(self.own(x).contiguous())

    def join(self, own: Tensor) -> Tensor:
        """The logits of all ranks, given this rank's."""
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
    """The parameters of a rank with their communication. `config` is that of the whole model."""
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
