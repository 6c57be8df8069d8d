"""Measures which inputs of a model's matrices matter, for rounding to 4 bits. The model writes the texts itself."""

from __future__ import annotations

import logging
import math
from contextlib import closing

import numpy as np
from msgspec.structs import replace

from brlite.backends.native.abi import INT4_MIN, LANES
from brlite.backends.native.backend import NativeBackend
from brlite.backends.native.library import NativeLibrary
from brlite.backends.native.packer import Importance, PackedWeights
from brlite.checkpoint.load_plan import NATIVE_FORMS, NOT_QUANTIZED, LoadPlan
from brlite.engine.backend import Batch, SamplingInput, ScheduledSeq
from brlite.models.precision import INT4_FORMS
from brlite.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

NUM_TEXTS, TEXT_TOKENS = 32, 32  # all texts at once: as fast as a prompt


def measure_importance(native: NativeLibrary, plan: LoadPlan, weights: PackedWeights) -> Importance:
    """The mean square of each input of a matrix that is rounded to 4 bits, divided by the mean over all its inputs.

    A weight's error changes the output by that error times its input: AWQ (Lin et al. 2023), llama.cpp's importance
    matrix. `weights` are those of the plan, rounded without importance. The result has the same bits on any instruction
    set and number of threads.
    """
    rounded = {
        target.parameter
        for name, target in plan.model.targets.items()
        if NATIVE_FORMS.get(plan.model.formats.get(name, NOT_QUANTIZED)) not in INT4_FORMS
    }
    squares = {
        name: np.zeros(parts[0].num_inputs)
        for name, parts in weights.layout.tensors.items()
        if name in rounded and any(part.format == INT4_MIN and part.form == "panels" for part in parts)
    }
    if not squares:
        return {}
    if plan.packed_file is None:
        logger.info("model %s is rounded to 4 bits at each start: it has no serialize_file", plan.spec.name)
    num_tokens = min(TEXT_TOKENS, plan.config.max_context)
    pages = math.ceil(num_tokens / LANES)
    spec = replace(plan.spec, build_seq=num_tokens, build_batch=NUM_TEXTS, num_blocks=NUM_TEXTS * pages)
    engine = replace(plan.engine, block_size=LANES, max_num_batched_tokens=NUM_TEXTS)
    small = replace(plan, spec=spec, engine=engine, packed_file=None)
    addresses = {name: sums.ctypes.data for name, sums in squares.items()}
    with closing(NativeBackend(native, small, loaded=weights, squares=addresses)) as backend:
        _write_texts(backend, small, pages)
    means = {name: sums.mean() for name, sums in squares.items()}
    # Squares that are not finite, or all 0, tell nothing.
    return {
        name: (sums / means[name] if 0 < means[name] < math.inf else np.ones_like(sums)).astype(np.float32)
        for name, sums in squares.items()
    }


def _write_texts(backend: NativeBackend, plan: LoadPlan, pages: int) -> None:
    """Texts that begin with a random token. Where none can be drawn, as without a head, another random one follows."""
    numbers = np.random.Generator(np.random.PCG64(0))
    params = SamplingParams(temperature=1.0, top_k=-1, top_p=1.0)
    token_ids = numbers.integers(plan.config.vocab_size, size=NUM_TEXTS).tolist()
    for position in range(plan.spec.build_seq):
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
        results = backend.execute(Batch(seqs)).seqs
        others = numbers.integers(plan.config.vocab_size, size=NUM_TEXTS).tolist()
        drawn = ([token.token_id for token in result.tokens] for result in results)
        token_ids = [next(iter(tokens), other) for tokens, other in zip(drawn, others, strict=True)]
        plan.report((position + 1) / plan.spec.build_seq, "finding which weights matter most")
