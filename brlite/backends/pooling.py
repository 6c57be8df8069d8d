"""Computes a prompt's embedding from the sum of its hidden states: on the host, in float64 until the end."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from brlite.engine.backend import PoolingInput, SeqResult

NOT_FINITE = "the model produced hidden states that are not finite"


def add_states(pooling: PoolingInput, states: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """The sum [H] of a run's hidden states [N, H], added to that of earlier runs."""
    total: npt.NDArray[np.float64] = states.sum(axis=0, dtype=np.float64)
    return total + np.frombuffer(pooling.total, np.float64) if pooling.total else total


def pooled_result(seq_id: int, pooling: PoolingInput, total: npt.NDArray[np.float64]) -> SeqResult:
    """The result of a run: its `total` [H], or at the prompt's end the embedding, which is cut, then normalized."""
    if pooling.params is None:
        return SeqResult(seq_id, hidden_total=total.tobytes())
    vector = total[: pooling.params.dimensions] / pooling.num_pooled
    if not np.isfinite(vector).all():
        return SeqResult(seq_id, error=NOT_FINITE)
    if pooling.params.normalize:
        length = float(np.sqrt(np.square(vector).sum()))
        vector = vector / max(length, np.finfo(np.float64).tiny)  # avoids 0 / 0 for a vector of zeros
    return SeqResult(seq_id, embedding=vector.astype(np.float32).tobytes())
