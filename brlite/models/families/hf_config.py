"""Reads the keys of a Hugging Face `config.json`, of old or new versions. Every error is a `ModelError` naming the key.

The file of each family interprets its own keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral
from typing import Any

from brlite.errors import ModelError
from brlite.files.quoting import MAX_EXCERPT, excerpt, one_line
from brlite.models.config import DynamicScaling, LinearScaling, Llama3Scaling, RopeConfig, RopeScaling, YarnScaling

QUANTIZATION_KEY = "quantization_config"  # the key of a quantized model's settings
DEFAULT_THETA = 10_000.0
MAX_SIZE = 2**31 - 1
MIN_NUMBER, MAX_NUMBER = 1e-30, 1e15  # results computed from them stay finite
MAX_LAYERS = 4096  # a bound for the list of names, which is made before tensors are read


class ConfigReader:
    """Typed access to the values of a config. A key that is absent or null takes its default, or is an error.

    `class_defaults` are the defaults of transformers' config class, for absent keys; a null is not replaced by them.
    """

    def __init__(
        self, values: Mapping[str, Any], prefix: str = "", class_defaults: Mapping[str, Any] | None = None
    ) -> None:
        self._values = {**(class_defaults or {}), **values}
        self._prefix = prefix

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def value(self, key: str) -> Any:
        """The unchecked value; None if there is none."""
        return self._values.get(key)

    def positive_int(self, key: str, default: int | None = None, *, most: int = MAX_SIZE) -> int:
        value = self._get(key, default)
        if not isinstance(value, Integral) or isinstance(value, bool) or not 0 < int(value) <= most:
            raise self.error(key, f"an integer from 1 to {most}", value)
        return int(value)

    def positive_number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not MIN_NUMBER <= value <= MAX_NUMBER:
            raise self.error(key, f"a number from {MIN_NUMBER} to {MAX_NUMBER:g}", value)
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false", value)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, "a string", value)
        return value

    def texts(self, key: str) -> list[str]:
        value = self._get(key, None)
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self.error(key, "a list of strings", value)
        return list(value)

    def section(self, key: str) -> ConfigReader:
        """The mapping under `key`; an empty one if there is none."""
        value = self._get(key, {})
        if not isinstance(value, Mapping):
            raise self.error(key, "an object", value)
        return ConfigReader(value, prefix=f"{self._prefix}{one_line(key, MAX_EXCERPT)}.")

    def error(self, key: str, allowed: str, got: object) -> ModelError:
        name = f"{self._prefix}{one_line(key, MAX_EXCERPT)}"
        return ModelError(f"model config: {name} must be {allowed}, got {excerpt(got)}")

    def _get(self, key: str, default: object) -> Any:
        value = self._values.get(key)
        if value is not None:
            return value
        if default is None:
            raise ModelError(f"model config: {self._prefix}{key} is missing")
        return default


def check_supported(reader: ConfigReader) -> None:
    """Raise `ModelError` for features that no family supports: other activations, weights packed by a quantizer."""
    activation = reader.text("hidden_act", "silu")
    if activation != "silu":
        raise reader.error("hidden_act", "silu", activation)
    if QUANTIZATION_KEY in reader:
        method = one_line(reader.section(QUANTIZATION_KEY).text("quant_method", "unknown"), MAX_EXCERPT)
        raise ModelError(
            f"model config: {QUANTIZATION_KEY} ({method}) is read with safetensors only; use those, or the model's "
            "plain or GGUF weights"
        )


def read_sizes(reader: ConfigReader) -> dict[str, Any]:
    """The fields of `ModelConfig` whose keys are the same in most families. The network's sizes have no defaults.

    Raises `ModelError` as `check_supported` does, too.
    """
    check_supported(reader)
    num_heads = reader.positive_int("num_attention_heads")
    return {
        "vocab_size": reader.positive_int("vocab_size"),
        "hidden_size": reader.positive_int("hidden_size"),
        "intermediate_size": reader.positive_int("intermediate_size"),
        "num_layers": reader.positive_int("num_hidden_layers", most=MAX_LAYERS),
        "num_heads": num_heads,
        "num_kv_heads": reader.positive_int("num_key_value_heads", num_heads),
        "head_dim": read_head_dim(reader),
        "rms_norm_eps": reader.positive_number("rms_norm_eps", 1e-6),
        "max_position_embeddings": reader.positive_int("max_position_embeddings"),
        "rope": read_rope(reader),
        "tie_word_embeddings": reader.flag("tie_word_embeddings", False),
    }


def read_head_dim(reader: ConfigReader) -> int:
    if "head_dim" in reader:
        return reader.positive_int("head_dim")
    hidden, heads = reader.positive_int("hidden_size"), reader.positive_int("num_attention_heads")
    if hidden % heads != 0:
        raise reader.error("hidden_size", f"a multiple of num_attention_heads ({heads})", hidden)
    return hidden // heads


def read_window(reader: ConfigReader, default: int | None = None, *, first: int = 0) -> dict[str, Any]:
    """The fields of a `ModelConfig` with a sliding window, in the layers of `layer_types`, or all from `first` on."""
    window = {"sliding_window": reader.positive_int("sliding_window", default)}
    num_layers = reader.positive_int("num_hidden_layers", most=MAX_LAYERS)
    if "layer_types" not in reader:
        return {**window, "sliding_layers": tuple(range(first, num_layers))}
    kinds = reader.texts("layer_types")
    if len(kinds) != num_layers:
        raise reader.error("layer_types", f"a list of {num_layers} entries", f"{len(kinds)} entries")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise reader.error("layer_types", "a list of full_attention and sliding_attention", kind)
    return {**window, "sliding_layers": tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")}


def read_rope(reader: ConfigReader) -> RopeConfig:
    """Rotary positions from `rope_theta` and `rope_scaling`, or from the `rope_parameters` of newer configs.

    If both are there, `rope_scaling` was added by a user, as guides for long contexts say, and replaces the other's.
    """
    saved, scaling = reader.section("rope_parameters"), reader.section("rope_scaling")
    parameters = scaling if len(scaling) else saved
    for key in parameters:
        if isinstance(value := parameters.value(key), Mapping):
            raise parameters.error(key, "one value: rope of each kind of layer is not supported", value)
    theta, fraction = DEFAULT_THETA, 1.0
    for source in (reader, saved, parameters):
        theta = source.positive_number("rope_theta", theta)
        fraction = source.positive_number("partial_rotary_factor", fraction)
    kind = parameters.text("rope_type", parameters.text("type", "default"))
    if kind not in SCALING_READERS:
        raise parameters.error("rope_type", f"one of {', '.join(SCALING_READERS)}", kind)
    rotary_dim = int(read_head_dim(reader) * fraction)
    # With these the scaled frequencies would be divided by zero.
    if kind == "dynamic" and rotary_dim == 2:
        raise parameters.error("rope_type", "other than dynamic where a head has 2 rotary dimensions", kind)
    if kind == "yarn" and theta == 1:
        raise reader.error("rope_theta", "other than 1 with yarn", theta)
    return RopeConfig(
        theta=theta,
        rotary_dim=rotary_dim,
        scaling=SCALING_READERS[kind](parameters, reader.positive_int("max_position_embeddings")),
    )


def _read_llama3(parameters: ConfigReader, positions: int) -> Llama3Scaling:
    low, high = (parameters.positive_number(f"{end}_freq_factor") for end in ("low", "high"))
    if not low < high:
        raise parameters.error("high_freq_factor", f"above low_freq_factor ({low:g})", high)
    return Llama3Scaling(
        factor=parameters.positive_number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_positions=parameters.positive_int("original_max_position_embeddings", positions),
    )


def _read_yarn(parameters: ConfigReader, positions: int) -> YarnScaling:
    original = parameters.positive_int("original_max_position_embeddings", positions)
    factor = parameters.positive_number("factor", positions / original)
    if "attention_factor" in parameters:
        attention_factor = parameters.positive_number("attention_factor")
    elif "mscale" in parameters and "mscale_all_dim" in parameters:
        scale, all_dim = (parameters.positive_number(key) for key in ("mscale", "mscale_all_dim"))
        attention_factor = _yarn_magnitude(factor, scale) / _yarn_magnitude(factor, all_dim)
    else:
        attention_factor = _yarn_magnitude(factor, 1.0)
    return YarnScaling(
        factor=factor,
        original_positions=original,
        attention_factor=attention_factor,
        beta_fast=parameters.positive_number("beta_fast", 32.0),
        beta_slow=parameters.positive_number("beta_slow", 1.0),
        truncate=parameters.flag("truncate", True),
    )


def _yarn_magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


SCALING_READERS: dict[str, Callable[[ConfigReader, int], RopeScaling | None]] = {
    "default": lambda parameters, positions: None,
    "linear": lambda parameters, positions: LinearScaling(parameters.positive_number("factor")),
    "dynamic": lambda parameters, positions: DynamicScaling(parameters.positive_number("factor"), positions),
    "llama3": _read_llama3,
    "yarn": _read_yarn,
}
