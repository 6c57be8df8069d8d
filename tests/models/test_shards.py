"""Who holds what: together the ranks hold everything, and nothing that counts twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brlite.errors import ConfigError
from brlite.models.config import ModelConfig, RopeConfig
from brlite.models.network import list_parameters
from brlite.models.shards import (
    Shard,
    check_num_ranks,
    head_ranges,
    rank_parameters,
    shard_config,
    shard_slices,
    vocabulary_range,
)


def make_config(
    *, num_kv_heads: int = 2, group: int = 2, head_dim: int = 4, intermediate: int = 70, vocab: int = 45
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=40,
        intermediate_size=intermediate,
        num_layers=1,
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        max_position_embeddings=8,
        rope=RopeConfig(rotary_dim=head_dim),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    )


configs = st.builds(
    make_config,
    num_kv_heads=st.integers(1, 6),
    group=st.integers(1, 5),
    head_dim=st.sampled_from([2, 4]),
    intermediate=st.integers(8, 300),
    vocab=st.integers(1, 200),
)


def times_held(config: ModelConfig, size: int, name: str, *, sums: bool) -> np.ndarray:
    """How many ranks hold each number of a parameter."""
    shape = list_parameters(config)[name].shape
    held = np.zeros(shape, int)
    for rank in range(size):
        rows, columns = shard_slices(config, Shard(rank, size, sums))[name]
        for part in rows:
            if columns is None:
                held[part.start : part.stop] += 1
            else:
                held[part.start : part.stop, columns.start : columns.stop] += 1
    return held


@given(configs, st.integers(1, 8), st.booleans())
def test_every_number_is_held_and_once_but_for_norms_and_shared_key_heads(
    config: ModelConfig, size: int, sums: bool
) -> None:
    size = min(size, config.num_heads)
    for name in list_parameters(config):
        held = times_held(config, size, name, sums=sums)
        if name.endswith("norm"):
            assert (held == size).all()
        elif "qkv" in name:
            assert (held[: config.q_size] == 1).all()
            assert (held >= 1).all()
        else:
            assert (held == 1).all()


@given(configs, st.integers(1, 8), st.booleans())
def test_what_a_rank_holds_has_the_shapes_of_its_config_but_for_padding(
    config: ModelConfig, size: int, sums: bool
) -> None:
    size = min(size, config.num_heads)
    for rank in range(size):
        shard = Shard(rank, size, sums)
        held, own = rank_parameters(config, shard), list_parameters(shard_config(config, shard))
        for name in ("layers.0.qkv.weight", "layers.0.qkv.bias", "layers.0.gate_up.weight"):
            assert held[name] == own[name]
        if sums:
            assert held["layers.0.o.weight"] == own["layers.0.o.weight"]
            assert held["layers.0.down.weight"] == own["layers.0.down.weight"]
            assert held["embedding"].shape[0] <= own["embedding"].shape[0]


@given(configs, st.integers(1, 8))
def test_a_ranks_query_heads_look_at_its_own_key_heads(config: ModelConfig, size: int) -> None:
    size = min(size, config.num_heads)
    for rank in range(size):
        heads, kv_heads = head_ranges(config, Shard(rank, size))
        assert {head // config.group_size for head in heads} == set(kv_heads)
        assert len(heads) % len(kv_heads) == 0


@pytest.mark.parametrize(("vocab", "sizes"), [(48, [16, 32]), (45, [16, 29]), (20, [16, 4]), (151936, [75968, 75968])])
def test_a_vocabulary_is_split_at_whole_lanes(vocab: int, sizes: list[int]) -> None:
    config = make_config(vocab=vocab)

    assert [len(vocabulary_range(config, Shard(rank, 2))) for rank in range(2)] == sizes


def test_eight_ranks_of_a_70b_hold_an_eighth_each() -> None:
    config = make_config(num_kv_heads=8, group=8, head_dim=128, intermediate=28672, vocab=32000)

    own = [shard_config(config, Shard(rank, 8)) for rank in range(8)]

    assert {(each.num_heads, each.num_kv_heads, each.intermediate_size) for each in own} == {(8, 1, 3584)}
    assert {each.vocab_size for each in own} == {4000}


def test_more_ranks_than_there_are_heads_or_neurons_are_refused() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel is 5; the model has 4 attention heads"):
        check_num_ranks(make_config(), 5)
    with pytest.raises(ConfigError, match="the model has 3 neurons in a layer"):
        check_num_ranks(make_config(intermediate=3), 4)
