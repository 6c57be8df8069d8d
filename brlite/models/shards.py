"""Tensor parallelism: the rows and columns of each parameter that a rank holds. Numbers only; imports no torch.

Every rank has some query heads with their key heads, a part of the MLP and a part of the vocabulary. Parts are as even
as possible, rank 0's is the smallest. With fewer key heads than ranks, several ranks hold the same key head.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from brlite.errors import ConfigError
from brlite.models.config import QUANTIZATION_GROUP, ModelConfig
from brlite.models.network import Parameter, Sharding, list_parameters

LANES = 16  # native kernels write 16 columns at a time, so ranks that write to shared rows begin at multiples


class Shard(msgspec.Struct, frozen=True):
    """Rank `rank` of the `size` ranks that compute a model together.

    With `sums` each rank holds some columns of `o` and `down`, and the ranks add up their products. Without, each holds
    some rows, and the ranks join their outputs: as many numbers, the same bits as with one rank, twice the barriers.
    """

    rank: int
    size: int
    sums: bool = True


class ShardSlice(NamedTuple):
    """A rank's part of one parameter: ranges of its rows, in order, and the columns of each row (None: all)."""

    rows: tuple[range, ...]
    columns: range | None = None


def check_num_ranks(config: ModelConfig, size: int) -> None:
    """Raise `ConfigError` if a dimension has fewer units than there are ranks."""
    for count, what in ((config.num_heads, "attention heads"), (config.intermediate_size, "neurons in a layer")):
        if size > count:
            raise ConfigError(f"tensor_parallel is {size}; the model has {count} {what}, and each rank needs one")


def check_groups(config: ModelConfig, size: int) -> None:
    """With `sums`, raise `ConfigError` if a rank's inputs end inside a group that shares an int8 scale."""
    for shard in (Shard(rank, size) for rank in range(size)):
        for sharding, part in _parts(config, shard).items():
            first = part.columns.start if part.columns else 0
            if first % QUANTIZATION_GROUP:
                name = {"head_inputs": "o.weight", "mlp_inputs": "down.weight"}[sharding]
                raise ConfigError(
                    f"tensor_parallel is {size}: rank {shard.rank}'s inputs of {name} begin at {first}, inside a group "
                    f"of {QUANTIZATION_GROUP} that share an int8 scale; allowed are fewer ranks, or precision bf16"
                )


def shard_config(config: ModelConfig, shard: Shard) -> ModelConfig:
    """The config of the rank's part. Its vocabulary is padded, so that all ranks have the same size."""
    heads, kv_heads = head_ranges(config, shard)
    sizes = (len(vocabulary_range(config, Shard(rank, shard.size))) for rank in range(shard.size))
    return msgspec.structs.replace(
        config,
        vocab_size=max(sizes),
        num_heads=len(heads),
        num_kv_heads=len(kv_heads),
        intermediate_size=len(mlp_range(config, shard)),
    )


def head_ranges(config: ModelConfig, shard: Shard) -> tuple[range, range]:
    """The rank's query heads, and the key heads that they read."""
    rank, size, num_kv_heads, group = shard.rank, shard.size, config.num_kv_heads, config.group_size
    if size <= num_kv_heads:
        kv_heads = _even_range(num_kv_heads, rank, size)
        return range(kv_heads.start * group, kv_heads.stop * group), kv_heads
    kv_head = rank * num_kv_heads // size
    holders = [other for other in range(size) if other * num_kv_heads // size == kv_head]
    heads = _even_range(group, holders.index(rank), len(holders))
    return range(kv_head * group + heads.start, kv_head * group + heads.stop), range(kv_head, kv_head + 1)


def mlp_range(config: ModelConfig, shard: Shard) -> range:
    """The rank's part of the MLP. With `sums` it has whole groups of int8 weights, if there are enough for all."""
    if not shard.sums:
        return _even_range(config.intermediate_size, shard.rank, shard.size, LANES)
    has_enough = config.intermediate_size >= QUANTIZATION_GROUP * shard.size
    return _even_range(config.intermediate_size, shard.rank, shard.size, QUANTIZATION_GROUP if has_enough else 1)


def hidden_range(config: ModelConfig, shard: Shard) -> range:
    """Without `sums`, the part of the residual stream that the rank adds to."""
    return _even_range(config.hidden_size, shard.rank, shard.size, LANES)


def vocabulary_range(config: ModelConfig, shard: Shard) -> range:
    """The range of token ids whose embeddings and logits the rank computes."""
    return _even_range(config.vocab_size, shard.rank, shard.size, LANES)


def rank_parameters(config: ModelConfig, shard: Shard) -> dict[str, Parameter]:
    """Every parameter with the shape of the rank's part. No shape is padded."""
    held = {}
    slices = shard_slices(config, shard)
    for name, parameter in list_parameters(config).items():
        rows, columns = slices[name]
        inputs = parameter.shape[1:] if columns is None else (len(columns),)
        held[name] = msgspec.structs.replace(parameter, shape=(sum(map(len, rows)), *inputs))
    return held


def shard_slices(config: ModelConfig, shard: Shard) -> dict[str, ShardSlice]:
    """The rank's part of every parameter by name."""
    parts = _parts(config, shard)
    return {
        name: parts.get(parameter.sharding, ShardSlice((range(parameter.shape[0]),)))
        for name, parameter in list_parameters(config).items()
    }


def _parts(config: ModelConfig, shard: Shard) -> dict[Sharding, ShardSlice]:
    """The rank's part of a parameter, for each `Sharding`."""
    size = config.head_dim
    heads, kv_heads = (range(part.start * size, part.stop * size) for part in head_ranges(config, shard))
    mlp, whole = mlp_range(config, shard), range(config.hidden_size)
    first_value = config.q_size + config.kv_size
    qkv = ShardSlice((heads, _shifted(kv_heads, config.q_size), _shifted(kv_heads, first_value)))
    gate_up = ShardSlice((mlp, _shifted(mlp, config.intermediate_size)))
    own_outputs = ShardSlice((hidden_range(config, shard),))
    return {
        "qkv": qkv,
        "gate_up": gate_up,
        "vocabulary": ShardSlice((vocabulary_range(config, shard),)),
        "head_inputs": ShardSlice((whole,), heads) if shard.sums else own_outputs,
        "mlp_inputs": ShardSlice((whole,), mlp) if shard.sums else own_outputs,
        # A bias is added once, and the ranks' products are summed.
        "summed_bias": ShardSlice((whole,) if shard.rank == 0 else ()) if shard.sums else own_outputs,
    }


def _even_range(total: int, rank: int, size: int, unit: int = 1) -> range:
    """Part `rank` of `size` parts of 0 .. `total`, which begin at multiples of `unit`."""
    num_units = -(-total // unit)
    return range(num_units * rank // size * unit, min(num_units * (rank + 1) // size * unit, total))


def _shifted(part: range, start: int) -> range:
    return range(part.start + start, part.stop + start)
