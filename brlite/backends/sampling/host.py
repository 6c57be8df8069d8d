"""Draws tokens from logits on the host: by the native kernels if a library is there, else by numpy.

Both draw as `reference.py` does. Neither needs torch; nothing is compiled for this.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import zip_longest

from brlite.backends.native.draws import Drawing, DrawTarget, NativeDraws, StepDraws
from brlite.backends.native.library import NativeLibrary, find_library
from brlite.backends.sampling import reference
from brlite.backends.sampling.rows import Logits, NumpyRows
from brlite.engine.backend import SampledToken, SamplingInput, TokenMask, Undrawn
from brlite.engine.outputs import TokenLogprob
from brlite.errors import EngineError, NativeUnavailable

logger = logging.getLogger(__name__)

SMALL_VOCABULARY = 4096  # up to here numpy takes under 0.3 ms a row, and loading the library would take longer


class ReferenceSampler:
    """Draws from logits [R, V] with numpy. A row's token depends on its own logits and input alone."""

    def sample(
        self, logits: Logits, inputs: Sequence[SamplingInput], masks: Sequence[TokenMask | None] = ()
    ) -> list[SampledToken | Undrawn]:
        """One token for each row, or the reason why there is none. May overwrite `logits`.

        `masks` are complete and one a row, or empty.
        """
        return reference.sample(NumpyRows(logits), inputs, masks)

    def token_logprobs(self, logits: Logits, targets: Sequence[int], num_top: int) -> list[TokenLogprob]:
        """The logprob of each row's target, with its `num_top` best alternatives."""
        return reference.token_logprobs(NumpyRows(logits), targets, num_top)


class NativeSampler:
    """The same in native code."""

    def __init__(self, library: NativeLibrary, vocab_size: int) -> None:
        self._library = library
        self._draws = NativeDraws(vocab_size)

    def sample(
        self, logits: Logits, inputs: Sequence[SamplingInput], masks: Sequence[TokenMask | None] = ()
    ) -> list[SampledToken | Undrawn]:
        pairs = zip_longest(inputs, masks)
        return self._run(
            logits, [Drawing(row, each, each.position, mask) for row, (each, mask) in enumerate(pairs)]
        ).tokens()

    def token_logprobs(self, logits: Logits, targets: Sequence[int], num_top: int) -> list[TokenLogprob]:
        wanted = [DrawTarget(row, target, num_top) for row, target in enumerate(targets)]
        return self._run(logits, [], wanted).target_logprobs()

    def _run(self, logits: Logits, drawings: Sequence[Drawing], targets: Sequence[DrawTarget] = ()) -> StepDraws:
        draws = self._draws.lay_out(drawings, targets)
        num_rows, vocab_size = logits.shape
        address = logits.ctypes.data
        error = self._library.functions.brlite_draw_rows(
            self._library.isa, draws.draws_address, draws.drawn_address, num_rows, vocab_size, address
        )
        if error:
            raise EngineError(f"the native sampler refused its rows: error {error}")
        return draws


HostSampler = ReferenceSampler | NativeSampler


def choose_sampler(vocab_size: int, find: Callable[[], NativeLibrary | None] = find_library) -> HostSampler:
    """The fastest available sampler for rows of that width."""
    if vocab_size <= SMALL_VOCABULARY:
        return ReferenceSampler()
    try:
        library = find()
    except NativeUnavailable as error:
        logger.info("tokens are drawn by numpy: %s", error)
        return ReferenceSampler()
    return ReferenceSampler() if library is None else NativeSampler(library, vocab_size)
