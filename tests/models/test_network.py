"""The one list of a decoder's operations, and that the families' weights fill what it names."""

from __future__ import annotations

from collections import defaultdict

import pytest

from brlite.models.config import ModelConfig
from brlite.models.network import Attend, build_network, list_parameters
from brlite.models.registry import find_family
from tests.tiny_models import LLAMA, QWEN3, SMOLLM3, TINY_CONFIGS


def read(config: dict[str, object]) -> ModelConfig:
    return find_family(config).read_config(config)


def kinds(config: ModelConfig, layer: int) -> list[str]:
    """What the operations of a layer are called."""
    per_layer = [[]]
    for operation in build_network(config).body[1:]:
        per_layer[-1].append(type(operation).__name__)
        if per_layer[-1][-2:] == ["Gate", "Multiply"]:
            per_layer.append([])
    return per_layer[layer]


ATTENTION, MLP = ["Attend", "Multiply"], ["Norm", "Multiply", "Gate", "Multiply"]


def test_a_layer_normalises_its_heads_and_turns_them_only_where_the_model_does() -> None:
    mixed = read(SMOLLM3 | {"num_hidden_layers": 2, "no_rope_layers": [0, 1]})

    assert kinds(read(LLAMA), 0) == ["Norm", "Multiply", "Rotate", *ATTENTION, *MLP]
    assert kinds(read(QWEN3), 0) == ["Norm", "Multiply", "HeadNorm", "Rotate", *ATTENTION, *MLP]
    assert [kinds(mixed, layer).count("Rotate") for layer in (0, 1)] == [0, 1]


def test_each_layer_attends_in_a_cache_of_its_own() -> None:
    config = read(LLAMA)

    attends = [operation for operation in build_network(config).body if isinstance(operation, Attend)]

    assert [operation.layer for operation in attends] == list(range(config.num_layers))


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_a_checkpoints_tensors_fill_every_parameter_once(name: str) -> None:
    config = read(TINY_CONFIGS[name])
    filled: dict[str, list[int]] = defaultdict(list)

    for target in find_family(TINY_CONFIGS[name]).weight_targets(config).values():
        parameter = list_parameters(config)[target.parameter]
        assert target.shape[1:] == parameter.shape[1:]
        filled[target.parameter] += range(target.start, target.start + target.shape[0])

    assert {name: sorted(rows) for name, rows in filled.items()} == {
        name: list(range(parameter.shape[0])) for name, parameter in list_parameters(config).items()
    }


def test_a_tied_embedding_is_the_heads_weight_and_is_named_once() -> None:
    config = read(TINY_CONFIGS["llama-tied"])

    head = build_network(config).head

    assert head.weight == list_parameters(config)["embedding"]
    assert (head.weight.precision, head.weight.is_looked_up) == ("weights", True)
    assert "head.weight" not in list_parameters(config)
