"""Draws the token of a sequence that has logits processors, on the host: runs them, checks their logits and draws.

The engine makes them and decides when they run (`engine/logits_processors.py`). A failure ends that sequence alone.
"""

from __future__ import annotations

import logging
import time

import numpy as np

from brlite.backends.sampling.host import HostSampler
from brlite.backends.sampling.rows import Logits
from brlite.engine.backend import LogitsProcessors, SampledToken, SamplingInput, TokenMask, Undrawn

logger = logging.getLogger(__name__)


def sample_processed(
    sampler: HostSampler,
    logits: Logits,
    entry: SamplingInput,
    mask: TokenMask | None,
    processors: LogitsProcessors,
) -> SampledToken | Undrawn:
    """Draw the token of one sequence after its logits processors. Overwrites `logits`, float32 [V].

    The logprobs are those of the model's own logits. `mask` must be complete.
    """
    if not np.isfinite(logits.max()):
        return Undrawn.NOT_FINITE
    own = None if entry.params.logprobs is None else logits[None].copy()
    processed = run_processors(processors, logits)
    if processed is None:
        return Undrawn.PROCESSOR_FAILED
    # The array may be the processor's own, for its next call too, and the sampler overwrites its logits.
    (token,) = sampler.sample(processed[None].copy(), [entry], [mask])
    if own is None or isinstance(token, Undrawn):
        return token
    (logprob,) = sampler.token_logprobs(own, [token.token_id], entry.params.logprobs or 0)
    return SampledToken(token.token_id, logprob)


def run_processors(processors: LogitsProcessors, logits: Logits) -> Logits | None:
    """The logits, float32 [V], after all processors; None where one failed, with the reason in `processors.error`.

    They are the model's own, before any other edit, and may be overwritten. Call it on the step's thread.
    """
    size = logits.size
    for name, function, num_inputs in processors.processors:
        start = time.perf_counter()
        try:
            prompt = (processors.prompt_token_ids,) if num_inputs == 3 else ()
            logits = function(*prompt, processors.output_token_ids, logits)
            fault = _find_fault(logits, size)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # even SystemExit must not end the requests of others
            logger.warning("the logits processor %s failed", name, exc_info=error)
            fault = f"failed: {type(error).__name__}"
        processors.seconds.append((name, time.perf_counter() - start))
        if fault is not None:
            processors.error = f"the logits processor {name} {fault}"
            return None
    return logits


def _find_fault(found: object, size: int) -> str | None:
    """What is wrong with the value that a processor returned; None if it is float32 [`size`] and allows a token."""
    if not isinstance(found, np.ndarray) or found.dtype != np.float32 or found.shape != (size,):
        what = f"{found.dtype} {list(found.shape)}" if isinstance(found, np.ndarray) else type(found).__name__
        return f"returned {what}; wanted is a numpy array, float32 [{size}]"
    best = float(found.max())
    if np.isfinite(best):
        return None
    return "excluded every token" if best < 0 else "returned logits with NaN or infinity"
