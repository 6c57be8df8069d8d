"""Reads the head of models that score a text or a pair: transformers' `…ForSequenceClassification` with one label, or
llama.cpp's rerankers with the labels yes and no.

Or makes one of a language model's head: the rows of the tokens that such a model answers with (Qwen3-Reranker).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from brlite.checkpoint.checked_model import SCORING_HEAD, CheckedModel, scoring_labels
from brlite.checkpoint.checkpoint import Checkpoint
from brlite.checkpoint.pooling_config import attends_both_ways
from brlite.errors import ConfigError, ModelError
from brlite.files.quoting import excerpt

OLD_KEY = "sbert_ce_default_activation_function"  # of sentence-transformers before 4.0
ACTIVATIONS = {"Sigmoid": True, "Identity": False}  # a torch module's name → whether scores are sigmoids


def read_scoring_head(checkpoint: Checkpoint, model: CheckedModel) -> tuple[npt.NDArray[np.float32], bool] | None:
    """The head's weight [H], and whether scores are sigmoids by default. None for a model without a head.

    Of two rows the weight is that of yes less that of no: then the sigmoid is the softmax of yes over both.
    `config.json` names the activation as sentence-transformers' cross encoders do; by default it is the sigmoid. Raises
    `ModelError` for a head that is not finite, for another activation, and for attention in both directions.
    """
    if not model.has_scoring_head:
        return None
    _check_attention(checkpoint)
    config = checkpoint.config
    section = config.get("sentence_transformers")
    name = section.get("activation_fn") if isinstance(section, Mapping) else None
    name = name or config.get(OLD_KEY) or "Sigmoid"
    has_sigmoid = ACTIVATIONS.get(str(name).rpartition(".")[2])
    if has_sigmoid is None:
        raise ModelError(f"model config: the activation of scores must be Sigmoid or Identity, got {excerpt(name)}")
    tensors = checkpoint.tensors()  # kept: a tensor can be read until the iterator goes on or ends
    rows = next(tensor for tensor in tensors if tensor.name == SCORING_HEAD).float32()
    labels = scoring_labels(config)
    weight: npt.NDArray[np.float32] = (
        rows[0] if len(rows) == 1 else rows[labels.index("yes")] - rows[labels.index("no")]
    )
    if not np.isfinite(weight).all():
        raise ModelError(f"{checkpoint.path}: {SCORING_HEAD} holds numbers that are not finite")
    return weight, has_sigmoid


def read_token_head(checkpoint: Checkpoint, model: CheckedModel, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """The head [H] whose product with a hidden state is the logit of the last of `token_ids`, less that of the first
    where there are two. Then its sigmoid is the softmax of both logits.

    Raises `ConfigError` for a model without a language model head, `ModelError` for weights that are not finite and for
    attention in both directions.
    """
    _check_attention(checkpoint)
    if not model.has_head:
        raise ConfigError(f"classifier_from_token is set, but {checkpoint.path} has no language model head")
    parameter = "head.weight" if "head.weight" in model.parameters else "embedding"
    for tensor in checkpoint.tensors():
        target = model.targets.get(tensor.name)
        if target is None or target.parameter != parameter:
            continue
        tensor = msgspec.structs.replace(tensor, has_unit_rows=target.has_unit_rows)
        rows = [tensor.part(range(token_id, token_id + 1)).float32()[0] for token_id in token_ids]
        weight: npt.NDArray[np.float32] = rows[-1] - rows[0] if len(rows) == 2 else rows[0]
        if not np.isfinite(weight).all():
            raise ModelError(f"{checkpoint.path}: {tensor.name} holds numbers that are not finite")
        return weight
    raise ModelError(f"{checkpoint.path}: the language model head is missing")


def _check_attention(checkpoint: Checkpoint) -> None:
    if attends_both_ways(checkpoint.config):
        raise ModelError(f"{checkpoint.path}: its files ask for attention in both directions: scores would be wrong")
