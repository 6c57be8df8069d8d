"""What a model family is: a translation of a config and of weight names onto the one decoder. No network code here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgspec

from brlite.models.config import ModelConfig
from brlite.models.network import parameter_dtype


class WeightTarget(msgspec.Struct, frozen=True):
    """Where a checkpoint's tensor goes: rows `start` onwards of the decoder's `parameter`. `shape` is the tensor's.

    With `has_unit_rows` each row is scaled to length 1 on its way there.
    """

    parameter: str
    shape: tuple[int, ...]
    start: int = 0
    has_unit_rows: bool = False

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """What the tensor's numbers are rounded to on their way, before any int8."""
        return parameter_dtype(self.parameter)


class Family(msgspec.Struct, frozen=True):
    """How the models of one `model_type` are read.

    `weight_targets` names every tensor a checkpoint must hold; `ignored_suffixes` end the names it may hold besides.
    `aliases` are other architectures by which configs call the same.
    """

    model_type: str
    architecture: str
    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    weight_targets: Callable[[ModelConfig], dict[str, WeightTarget]]
    ignored_suffixes: tuple[str, ...] = ("rotary_emb.inv_freq",)
    aliases: tuple[str, ...] = ()
