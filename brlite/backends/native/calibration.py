"""Measures which inputs of a model's matrices matter, for rounding to 4 bits. The model writes the texts itself."""

from __future__ import annotations

import math
from contextlib import closing

import numpy as np
from msgspec.structs import replace

from brlite.backends.native.abi import INT4_MIN, LANES
from brlite.backends.native.backend import NativeBackend
from brlite.backends.native.library import NativeLibrary
from brlite.backends.native.packer import Importance, PackedWeights
from brlite.checkpoint.load_plan import LoadPlan
from brlite.engine.backend import Batch, SamplingInput, ScheduledSeq
from brlite.sampling_params import SamplingParams

NUM_TEXTS, TEXT_TOKENS = 32, 32  # all texts at once: as fast as a prompt


def measure_importance(native: NativeLibrary, plan: LoadPlan, weights: PackedWeights) -> Importance:
    """The mean square of each input of the matrices in 4 bits, divided by that of the matrix's inputs together.

    A weight's error changes the output by that error times its input: AWQ (Lin et al. 2023), llama.cpp's importance
    matrix. `weights` are those of the plan, rounded without importance. The result has the same bits on any instruction
    set and number of threads.
    """
    squares = {
        name: np.zeros(part.num_inputs)
        for name, (part, *_) in weights.layout.tensors.items()
        if part.format == INT4_MIN and part.form == "panels"
    }
    pages = math.ceil(TEXT_TOKENS / LANES)
    spec = replace(plan.spec, build_batch=NUM_TEXTS, num_blocks=NUM_TEXTS * pages)
    engine = replace(plan.engine, block_size=LANES, max_num_batched_tokens=NUM_TEXTS)
    small = replace(plan, spec=spec, engine=engine, packed_file=None)
    addresses = {name: sums.ctypes.data for name, sums in squares.items()}
    with closing(NativeBackend(native, small, loaded=weights, squares=addresses)) as backend:
        _write_texts(backend, plan, pages)
    means = {name: sums.mean() for name, sums in squares.items()}
    # Squares that are not finite, or all 0, tell nothing.
    return {
        name: (sums / means[name] if 0 < means[name] < math.inf else np.ones_like(sums)).astype(np.float32)
        for name, sums in squares.items()
    }


def _write_texts(backend: NativeBackend, plan: LoadPlan, pages: int) -> None:
    """Texts that begin with a random token. A model without a head goes on with random tokens."""
    numbers = np.random.Generator(np.random.PCG64(0))
    params = SamplingParams(temperature=1.0, top_k=-1, top_p=1.0)
    token_ids = numbers.integers(plan.config.vocab_size, size=NUM_TEXTS).tolist()
    for position in range(min(TEXT_TOKENS, plan.spec.build_seq)):
        seqs = [
            ScheduledSeq(
                seq_id=text,
                start=position,
                token_ids=[token_id],
                block_table=list(range(text * pages, (text + 1) * pages)),
                sampling=SamplingInput(params, seed=text, position=position) if plan.model.has_head else None,
            )
            for text, token_id in enumerate(token_ids)
        ]
        drawn = [token.token_id for result in backend.execute(Batch(seqs)).seqs for token in result.tokens]
        token_ids = drawn or numbers.integers(plan.config.vocab_size, size=NUM_TEXTS).tolist()
        plan.report((position + 1) / TEXT_TOKENS, "finding which weights matter most")
