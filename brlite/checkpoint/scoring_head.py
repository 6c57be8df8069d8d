"""Reads the head of models that score a text or a pair: transformers' `…ForSequenceClassification` with one label."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from brlite.checkpoint.checked_model import SCORING_HEAD, CheckedModel
from brlite.checkpoint.checkpoint import Checkpoint
from brlite.errors import ModelError
from brlite.files.quoting import excerpt

OLD_KEY = "sbert_ce_default_activation_function"  # of sentence-transformers before 4.0
ACTIVATIONS = {"Sigmoid": True, "Identity": False}  # a torch module's name → whether scores are sigmoids


def read_scoring_head(checkpoint: Checkpoint, model: CheckedModel) -> tuple[npt.NDArray[np.float32], bool] | None:
    """The head's weight [H], and whether a score is its sigmoid unless a request says else. None without a head.

    The activation is what sentence-transformers' cross encoders state in `config.json`; without one it is the sigmoid.
    Raises `ModelError` for a head that is not finite, or an activation that is not known.
    """
    if not model.has_scoring_head:
        return None
    config = checkpoint.config
    section = config.get("sentence_transformers")
    name = section.get("activation_fn") if isinstance(section, Mapping) else None
    name = name or config.get(OLD_KEY) or "Sigmoid"
    has_sigmoid = ACTIVATIONS.get(str(name).rpartition(".")[2])
    if has_sigmoid is None:
        raise ModelError(f"model config: the activation of scores must be Sigmoid or Identity, got {excerpt(name)}")
    tensors = checkpoint.tensors()  # held here: what is found can be read until the next one is asked for
    weight = next(tensor for tensor in tensors if tensor.name == SCORING_HEAD).float32()[0]
    if not np.isfinite(weight).all():
        raise ModelError(f"{checkpoint.path}: {SCORING_HEAD} holds numbers that are not finite")
    return weight, has_sigmoid
