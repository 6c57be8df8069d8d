"""From the sum of a prompt's hidden states to its embedding: on the host, in float64 until the end."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from brlite.engine.backend import PoolingInput, SeqResult

NOT_FINITE = "the model produced hidden states that are not finite"


def pooled_result(seq_id: int, pooling: PoolingInput, total: npt.NDArray[np.float64]) -> SeqResult:
    """What a run gives: its `total` [H], or at the prompt's end the embedding, which is cut before it is scaled."""
    if pooling.params is None:
        return SeqResult(seq_id, hidden_total=total.tobytes())
    vector = total[: pooling.params.dimensions] / pooling.num_pooled
    if not np.isfinite(vector).all():
        return SeqResult(seq_id, error=NOT_FINITE)
    if pooling.params.normalize:
        length = float(np.sqrt(np.square(vector).sum()))
        vector = vector / max(length, np.finfo(np.float64).tiny)  # a vector of zeros stays one
    return SeqResult(seq_id, embedding=vector.astype(np.float32).tobytes())
