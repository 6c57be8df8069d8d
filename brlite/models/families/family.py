"""`Family`: translates an architecture's config and weight names to those of our decoder. No network code here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from brlite.models.config import ModelConfig
from brlite.models.network import list_parameters

# The checkpoint's name of each parameter. A matrix that the checkpoint stores as several tensors has several names.
# `{}` stands for the number of the layer.
WeightNames = Mapping[str, str | tuple[str, ...]]


class WeightTarget(msgspec.Struct, frozen=True):
    """Where a checkpoint's tensor goes: rows `start` onwards of the decoder's `parameter`. `shape` is the tensor's.

    With `has_unit_rows` each row is scaled to length 1 while loading.
    """

    parameter: str
    shape: tuple[int, ...]
    start: int = 0
    has_unit_rows: bool = False


class Family(msgspec.Struct, frozen=True):
    """How the models of one `model_type` are read.

    `weight_names` name every tensor that a checkpoint must have; names that end with `ignored_suffixes` may be there
    too. `unit_rows` are the parameters whose rows are scaled to length 1. `aliases` are other names of the architecture
    in configs.
    """

    model_type: str
    architecture: str
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    weight_names: WeightNames
    ignored_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq",)
    unit_rows: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def base_architecture(self) -> str | None:
        """The architecture's name without a language model head, as transformers' `AutoModel` saves it."""
        name = self.architecture.removesuffix("ForCausalLM")
        return None if name == self.architecture or self.unit_rows else f"{name}Model"

    @property
    def scorer_architecture(self) -> str | None:
        """The architecture's name with a scoring head: transformers' `…ForSequenceClassification`."""
        base = self.base_architecture
        return None if base is None else f"{base.removesuffix('Model')}ForSequenceClassification"

    def without_head(self) -> Family:
        """The family for models without a language model head: the embedding is used in its place, as a tied one."""

        def read_config(values: Mapping[str, Any]) -> ModelConfig:
            return self.read_config({**values, "tie_word_embeddings": True})

        return msgspec.structs.replace(self, read_config=read_config)

    def weight_targets(self, config: ModelConfig) -> dict[str, WeightTarget]:
        """The target of every tensor that a checkpoint must have, by its name there."""
        parts = {
            "qkv": (config.q_size, config.kv_size, config.kv_size),
            "gate_up": (config.intermediate_size, config.intermediate_size),
        }
        targets: dict[str, WeightTarget] = {}
        for name, parameter in list_parameters(config).items():
            suffix = ".bias" if name.endswith(".bias") else ".weight"
            *layer, module = name.removesuffix(suffix).removeprefix("layers.").split(".")
            names = self.weight_names[module]
            names, sizes = ((names,), parameter.shape[:1]) if isinstance(names, str) else (names, parts[module])
            start = 0
            for source, size in zip(names, sizes, strict=True):
                shape = (size, *parameter.shape[1:])
                target = WeightTarget(name, shape, start, has_unit_rows=name in self.unit_rows)
                targets[source.format(*layer) + suffix] = target
                start += size
        return targets
