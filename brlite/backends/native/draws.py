"""Converts the draws of a step: the engine's sampling inputs to the structs of the kernels, and results back.

`src/sample.h` draws, with the semantics of `sampling/reference.py`. Logits and sequences are not used here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from brlite.backends.native import abi
from brlite.backends.sampling.random_numbers import uniform
from brlite.backends.sampling.reference import MAX_TEMPERATURE
from brlite.backends.sampling.rows import Logits, allowed_words
from brlite.engine.backend import SampledToken, SamplingInput, TokenMask, Undrawn
from brlite.engine.outputs import TokenLogprob
from brlite.sampling_params import SamplingParams

_MAX_KEPT = 1024
_INT32_BYTES = 4
_UNDRAWN = {-1: Undrawn.NOT_FINITE, -2: Undrawn.NOTHING_ALLOWED}  # as in sample.h


class Drawing(NamedTuple):
    """A token to draw after `row` of the step. `position` is `sampling.position`, or later after draft tokens.

    With `logits`, float32 [V], the step copies the row there, and the token that it draws has no meaning.
    """

    row: int
    sampling: SamplingInput
    position: int
    mask: TokenMask | None = None
    logits: Logits | None = None


class DrawTarget(NamedTuple):
    """A token of a prompt whose logprob after `row` is wanted, with `num_top` alternatives."""

    row: int
    token_id: int
    num_top: int


class NativeDraws:
    """Packs draws. The part that depends on a request's parameters only is packed once and cached."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._kept: dict[int, _Settings] = {}  # by id of the params, which the entry keeps alive

    def lay_out(self, drawings: Sequence[Drawing], targets: Sequence[DrawTarget] = ()) -> StepDraws:
        """Pack the draws of one step: `drawings`, then `targets`."""
        settings: list[_Settings] = []
        for params in (drawing.sampling.params for drawing in drawings):
            entry = self._kept.get(id(params))
            if entry is None:
                if len(self._kept) >= _MAX_KEPT:
                    self._kept.clear()
                entry = self._kept[id(params)] = _Settings.of(params, self._vocab_size)
            settings.append(entry)
        packed_targets = [
            bytes(abi.Draw(row=target.row, target=target.token_id, num_logprobs=min(target.num_top, self._vocab_size)))
            for target in targets
        ]
        packed = b"".join([entry.packed for entry in settings] + packed_targets)
        return StepDraws(bytearray(packed), drawings, targets, settings)


class StepDraws:
    """The draws of one step and the memory that they point to. Keep it until the step has ended."""

    def __init__(
        self,
        packed: bytearray,
        drawings: Sequence[Drawing],
        targets: Sequence[DrawTarget],
        settings: Sequence[_Settings],
    ) -> None:
        self._drawings, self._targets, self._settings = drawings, targets, settings
        self.num_draws = len(drawings) + len(targets)
        # ctypes, not numpy: with few rows numpy's calls take longer than a stream's other work in a step.
        self._draws = (abi.Draw * self.num_draws).from_buffer(packed)
        self._drawn = (abi.Drawn * self.num_draws)()
        self._banned: list[npt.NDArray[np.int32]] = []
        for draw, drawing, entry in zip(self._draws, drawings, settings, strict=False):
            draw.row = drawing.row
            if not entry.is_greedy:
                draw.uniform = uniform(drawing.sampling.seed, drawing.position)
            sampling = drawing.sampling
            if (
                sampling.banned_token_ids
                or sampling.costs
                or entry.is_penalised
                or drawing.mask
                or drawing.logits is not None
            ):
                self._point_to_edits(draw, drawing, entry)
        num_top = max((draw.num_logprobs for draw in self._draws), default=0)
        if num_top <= 0:
            return
        shape = self.num_draws, num_top
        self._top_ids, self._top_logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        ids, logprobs = self._top_ids.ctypes.data, self._top_logprobs.ctypes.data
        for offset, drawn in enumerate(self._drawn):
            drawn.top_ids = ids + offset * num_top * _INT32_BYTES
            drawn.top_logprobs = logprobs + offset * num_top * _INT32_BYTES

    @property
    def draws_address(self) -> int:
        return ctypes.addressof(self._draws)

    @property
    def drawn_address(self) -> int:
        return ctypes.addressof(self._drawn)

    def tokens(self) -> list[SampledToken | Undrawn]:
        """The token drawn for each drawing."""
        return [
            _UNDRAWN[token_id]
            if (token_id := drawn.token) < 0
            else SampledToken(token_id, None if entry.num_top < 0 else self._logprob(i, token_id))
            for i, (drawn, entry) in enumerate(zip(self._drawn, self._settings, strict=False))
        ]

    def target_logprobs(self) -> list[TokenLogprob]:
        """The logprob of each target; not finite if its logits are not finite."""
        first = len(self._drawings)
        return [self._logprob(first + i, target.token_id) for i, target in enumerate(self._targets)]

    def _logprob(self, index: int, token_id: int) -> TokenLogprob:
        found = self._drawn[index]
        num_top = self._draws[index].num_logprobs if found.token >= 0 else 0
        if num_top == 0:
            return TokenLogprob(token_id, found.logprob)
        ids, logprobs = self._top_ids[index, :num_top].tolist(), self._top_logprobs[index, :num_top].tolist()
        return TokenLogprob(token_id, found.logprob, tuple(zip(ids, logprobs, strict=True)))

    def _point_to_edits(self, draw: abi.Draw, drawing: Drawing, entry: _Settings) -> None:
        """Set the pointers to what changes with each step, where there is any: bans, masks, counts, costs, logits."""
        _, sampling, _, mask, logits = drawing
        if logits is not None:
            draw.logits, draw.target, draw.num_logprobs = logits.ctypes.data, 0, min(draw.num_logprobs, 0)
            return
        if mask:
            draw.mask, draw.is_mask_filled = (ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in mask)
        if sampling.banned_token_ids:
            banned = np.array(sampling.banned_token_ids, dtype=np.int32)
            self._banned.append(banned)
            draw.num_banned, draw.banned_ids = len(banned), banned.ctypes.data
        if sampling.costs:
            draw.num_costs = len(sampling.cost_token_ids) // _INT32_BYTES
            draw.cost_ids, draw.costs = _address(sampling.cost_token_ids), _address(sampling.costs)
        if entry.is_penalised:
            draw.num_counted = len(sampling.counted_token_ids) // _INT32_BYTES
            draw.counted_ids = _address(sampling.counted_token_ids)
            draw.output_counts = _address(sampling.output_counts)


class _Settings(NamedTuple):
    """What all draws of a request have in common: a packed `abi.Draw` and the arrays that it points to."""

    packed: bytes
    params: SamplingParams
    is_greedy: bool
    is_penalised: bool
    num_top: int  # -1: no logprobs
    bias_ids: npt.NDArray[np.int32]
    biases: npt.NDArray[np.float32]
    allowed: npt.NDArray[np.int32] | None

    @classmethod
    def of(cls, params: SamplingParams, vocab_size: int) -> _Settings:
        bias_ids = np.array(list(params.logit_bias), dtype=np.int32)
        biases = np.array(list(params.logit_bias.values()), dtype=np.float32)
        allowed = allowed_words(params.allowed_token_ids, vocab_size) if params.allowed_token_ids else None
        num_top = -1 if params.logprobs is None else min(params.logprobs, vocab_size)
        draw = abi.Draw(
            target=-1,
            temperature=0.0 if params.is_greedy else min(params.temperature, MAX_TEMPERATURE),
            top_k=vocab_size if params.top_k == -1 else min(params.top_k, vocab_size),
            num_logprobs=num_top,
            num_biases=len(bias_ids),
            bias_ids=bias_ids.ctypes.data,
            biases=biases.ctypes.data,
            allowed=None if allowed is None else allowed.ctypes.data,
            **{name: getattr(params, name) for name in abi.DRAW_PARAMETERS},
        )
        return cls(bytes(draw), params, params.is_greedy, params.has_penalties, num_top, bias_ids, biases, allowed)


def _address(data: bytes) -> int | None:
    """The address of bytes, which the caller must keep alive."""
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
