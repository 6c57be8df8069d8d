"""Checks that a checkpoint, its config and the model's spec fit together. Reads headers only and needs no torch.

A broken model folder is refused in milliseconds, before torch is imported, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import msgspec

from brlite.checkpoint import Checkpoint
from brlite.checkpoint.bundle import precision_made_for
from brlite.checkpoint.checkpoint import naming
from brlite.checkpoint.stored_tensor import PLAIN_FORMATS
from brlite.config.options import ModelSpec
from brlite.errors import ConfigError, ModelError
from brlite.files.quoting import MAX_EXCERPT, excerpt, one_line
from brlite.models.config import ModelConfig
from brlite.models.families.family import Family, WeightTarget
from brlite.models.network import Parameter, list_parameters
from brlite.models.precision import PRECISIONS, Precision, PrecisionName, PrecisionOption
from brlite.models.registry import find_family
from brlite.models.shards import check_num_ranks

BODY = "model."
SCORING_HEAD = "score.weight"  # [1, H], or [2, H] with the labels yes and no
MAX_NAMED = 3  # how many tensors a message lists before it only counts them


class CheckedModel(NamedTuple):
    """What was found in a checkpoint: the config, the decoder's parameters, and where each of its tensors goes.

    `targets` has the tensors that the decoder uses, `ignored` the others. `formats` has the name of each tensor's
    `Format`; with `auto`, the precision depends on them. A model without `has_head` makes embeddings only. One with
    `has_scoring_head` makes scores; its tensor `SCORING_HEAD` is among the ignored ones.
    """

    config: ModelConfig
    parameters: Mapping[str, Parameter]
    targets: Mapping[str, WeightTarget]
    ignored: set[str]
    formats: Mapping[str, str]
    precision: Precision
    has_head: bool = True
    has_scoring_head: bool = False


def check_model(checkpoint: Checkpoint, spec: ModelSpec) -> CheckedModel:
    """Check a model. Raises `ModelError` for missing, misshapen or unknown tensors, and what `check_spec` raises."""
    with naming(checkpoint.path):
        family = find_family(checkpoint.config)
        config = family.read_config(checkpoint.config)
    check_spec(spec, config)
    targets = find_targets(family, config, checkpoint.shapes())
    architecture = (checkpoint.config.get("architectures") or ("",))[0]
    has_scoring_head = architecture == family.scorer_architecture
    has_head = architecture != family.base_architecture and not has_scoring_head
    if has_scoring_head:
        _check_scoring_head(checkpoint, config.hidden_size)
        family = msgspec.structs.replace(family, ignored_suffixes=(*family.ignored_suffixes, SCORING_HEAD))
    ignored, formats = _check_tensors(checkpoint, targets, family, config), checkpoint.formats()
    precision = settle_precision(spec.precision, formats, precision_made_for(checkpoint))
    return CheckedModel(
        config, list_parameters(config), targets, ignored, formats, precision, has_head, has_scoring_head
    )


def find_targets(family: Family, config: ModelConfig, names: Collection[str]) -> Mapping[str, WeightTarget]:
    """Where each tensor goes, in a checkpoint that has those `names`. Embedding models are saved without `BODY`."""
    targets = family.weight_targets(config)
    body = [name for name in targets if name.startswith(BODY)]
    if not any(name in names for name in body) and any(name.removeprefix(BODY) in names for name in body):
        return {name.removeprefix(BODY): target for name, target in targets.items()}
    return targets


def scoring_labels(config: Mapping[str, Any]) -> list[str]:
    """The labels of a scoring head's rows, in lower case; [] where `config` has none."""
    labels = config.get("id2label")
    return [str(label).lower() for label in labels.values()] if isinstance(labels, Mapping) else []


def _check_scoring_head(checkpoint: Checkpoint, hidden_size: int) -> None:
    shape = checkpoint.shapes().get(SCORING_HEAD)
    if shape is None:
        raise ModelError(f"{checkpoint.path}: {SCORING_HEAD} is missing, the head of a model that scores")
    num_labels = 2 if sorted(scoring_labels(checkpoint.config)) == ["no", "yes"] else 1
    if tuple(shape) != (num_labels, hidden_size):
        wanted = f"a model that scores has one label, or yes and no: {[num_labels, hidden_size]}"
        raise ModelError(f"{checkpoint.path}: {SCORING_HEAD} has shape {excerpt(list(shape))}; {wanted}")


def settle_precision(
    option: PrecisionOption, formats: Mapping[str, str], made_for: PrecisionName | None = None
) -> Precision:
    """The precision that `option` means for a checkpoint with these formats, or a bundle that was made for one."""
    precision = PRECISIONS[made_for or "bf16" if option == "auto" else option]
    if (option == "auto" or precision.has_int8_activations) and quantized_formats(formats):
        return precision._replace(weights="stored")
    return precision


def quantized_formats(formats: Mapping[str, str]) -> list[str]:
    """The names of the quantized formats among them, the most frequent first."""
    names = [name for name in formats.values() if name not in PLAIN_FORMATS]
    return sorted(set(names), key=lambda name: (-names.count(name), name))


def check_spec(spec: ModelSpec, config: ModelConfig) -> None:
    """Raise `ConfigError` if `spec` does not fit the model: its context, its vocabulary, its number of heads."""
    if spec.build_seq > config.max_context:
        raise ConfigError(f"build_seq is {spec.build_seq}; {spec.name} allows at most {config.max_context} positions")
    if spec.vocab_size is not None and spec.vocab_size != config.vocab_size:
        raise ConfigError(f"vocab_size is {spec.vocab_size}; {spec.name} has {config.vocab_size} embedding rows")
    if spec.precision == "a_bf16_w_int4" and spec.tensor_parallel > 1:
        raise ConfigError(f"tensor_parallel is {spec.tensor_parallel}; precision a_bf16_w_int4 allows one rank only")
    check_num_ranks(config, spec.tensor_parallel)


def _check_tensors(
    checkpoint: Checkpoint, targets: Mapping[str, WeightTarget], family: Family, config: ModelConfig
) -> set[str]:
    """The names of the tensors that the decoder does not use. Raises `ModelError` as `check_model` does."""
    path, shapes = checkpoint.path, checkpoint.shapes()
    missing = [name for name in targets if name not in shapes]
    if missing:
        others = [name for name in shapes if name not in targets][:1] if missing == list(targets) else []
        found = f"; its tensors have names like {excerpt(others[0])}" if others else ""
        raise ModelError(f"{path}: {_listed(missing)} missing{found}")
    for name, target in targets.items():
        if tuple(shapes[name]) != target.shape:
            raise ModelError(
                f"{path}: {name} has shape {excerpt(list(shapes[name]))}; the config wants {list(target.shape)}"
            )
    extra = {name for name in shapes if name not in targets}
    tied_head = {"lm_head.weight"} if config.tie_word_embeddings else set()
    unexpected = sorted(name for name in extra - tied_head if not name.endswith(family.ignored_suffixes))
    if unexpected:
        raise ModelError(f"{path}: {_listed(unexpected)} not expected in a {family.model_type} model")
    return extra


def _listed(names: list[str]) -> str:
    shown = ", ".join(one_line(name, MAX_EXCERPT) for name in names[:MAX_NAMED])
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"{shown}{more} {'is' if len(names) == 1 else 'are'}"
