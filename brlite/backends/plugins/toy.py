"""The toy engine: echoes the user's message. A worked example of the contract, and a fake server for tests of clients.

It behaves like a compiled engine with a static batch: every slot in every step, padded to one length, prompts one at a
time and never with decodes. Its logits are a function of all tokens in the slot and of nothing else, so that an error
of the caller is visible. Numpy only; no files, no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from brlite.backends.plugins.contract import Capabilities, PluginRow
from brlite.backends.plugins.slots import Slots
from brlite.backends.plugins.toy_text import ASSISTANT, END, USER, VOCAB_SIZE, toy_tokenizer
from brlite.config.options import EngineConfig, ModelSpec
from brlite.config.validation import convert
from brlite.errors import BackendLost, EngineError
from brlite.tokenizer import Tokenizer

Rate = Annotated[float, Meta(ge=0, le=10**9)]
Every = Annotated[int, Meta(ge=0, le=10**9)]

# With these logits, sampled tokens differ from the expected ones never at temperature 1, 1 in 200 at 2, 9 in 10 at 8.
CERTAINTY = 20.0  # the logit of the expected token
SPREAD = 4.0  # the logits of other letters lie in a range of this width, around 0
UNLIKELY = -30.0  # the logits of other bytes lie around this, so that noise is still text
LETTERS = range(32, 127)

HIDDEN_SIZE = 8

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(40)  # leaves 24 bits, the precision of a float32


class ToyOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`--engine-option NAME=VALUE`, or `[engine] options`. 0 is off.

    Loading takes `start_seconds`. A step of decodes takes 1 / `tokens_per_second` seconds, so each stream gets that
    rate. A prompt takes its length / `prompt_tokens_per_second`. Every `fail_every`-th step raises, every
    `nan_every`-th has NaN in its first row; at the `lost_at`-th the engine raises `BackendLost` from then on.
    """

    start_seconds: Rate = 0.0
    tokens_per_second: Rate = 0.0
    prompt_tokens_per_second: Rate = 0.0
    fail_every: Every = 0
    nan_every: Every = 0
    lost_at: Every = 0


class ToyEngine:
    """An `Engine`, a `BringsTokenizer`, and one that `GivesHiddenStates`."""

    def __init__(self, sleep: Callable[[float], object] = time.sleep) -> None:
        self._sleep = sleep
        self._options = ToyOptions()
        self._slots: Slots | None = None
        self._num_steps = 0

    def open(self, spec: ModelSpec, config: EngineConfig) -> Capabilities:
        self._options = convert(dict(config.options), ToyOptions, source="engine toy, options", is_text=True)
        self._sleep(self._options.start_seconds)
        capabilities = self.capabilities(spec)
        self._slots = Slots(capabilities)
        self._token_ids = np.zeros((spec.build_batch, spec.build_seq), np.int32)
        return capabilities

    def capabilities(self, spec: ModelSpec) -> Capabilities:
        return Capabilities(
            name="toy",
            version="1",
            max_seqs=spec.build_batch,
            max_model_len=spec.build_seq,
            vocab_size=VOCAB_SIZE,
            can_chunk_prompts=True,
            needs_every_slot=True,
            hidden_size=HIDDEN_SIZE,
            is_deterministic=True,
            is_batch_invariant=True,
            tolerance=0.0,
            device="cpu (toy)",
            dtype="float32",
            fingerprint="toy1",
        )

    def tokenizer(self) -> Tokenizer:
        return toy_tokenizer()

    def step(self, rows: Sequence[PluginRow]) -> npt.NDArray[np.float32]:
        slots = self._opened()
        slots.check(rows)
        self._num_steps += 1
        prompt_rate, rate = self._options.prompt_tokens_per_second, self._options.tokens_per_second
        num_prompt_tokens = sum(len(row.token_ids) for row in rows if row.is_prompt)
        if num_prompt_tokens and prompt_rate:
            self._sleep(num_prompt_tokens / prompt_rate)
        if not num_prompt_tokens and rate:
            self._sleep(1 / rate)
        if self._is_turn(self._options.fail_every):
            raise EngineError(f"step {self._num_steps} fails: engine.options.fail_every is set")
        if 0 < self._options.lost_at <= self._num_steps:
            raise BackendLost(f"it is lost at step {self._options.lost_at}: engine.options.lost_at is set")
        self.compute(pad(rows))
        slots.extend(rows)
        return self.logits(rows)

    def compute(self, step: PaddedStep) -> None:
        """Store the tokens at their positions, as a model stores keys and values."""
        for slot, token_ids, start, length in zip(*step, strict=True):
            self._token_ids[slot, start : start + length] = token_ids[:length]

    def logits(self, rows: Sequence[PluginRow]) -> npt.NDArray[np.float32]:
        """The logits [R, V] after the last token of each row; of a row without tokens zeros."""
        logits = np.zeros((len(rows), VOCAB_SIZE), np.float32)
        busy = [index for index, row in enumerate(rows) if len(row.token_ids)]
        for index in busy:
            logits[index] = token_logits(self._token_ids[rows[index].slot, : rows[index].end])
        if self._is_turn(self._options.nan_every):
            logits[busy[:1]] = np.nan
        return logits

    def hidden_states(self, slots: Sequence[int]) -> npt.NDArray[np.float32]:
        lengths = self._opened().lengths
        return np.stack([token_state(self._token_ids[slot, : lengths[slot]]) for slot in slots])

    def release(self, slot: int) -> None:
        self._opened().release(slot)
        self._token_ids[slot] = 0

    def close(self) -> None:
        self._slots = None

    def _opened(self) -> Slots:
        if self._slots is None:
            raise EngineError("the engine is closed")
        return self._slots

    def _is_turn(self, every: int) -> bool:
        return every > 0 and self._num_steps % every == 0


class PaddedStep(NamedTuple):
    """A step in static shapes: token ids [B, T] padded with 0, and the start and length of each row."""

    slots: list[int]
    token_ids: npt.NDArray[np.int32]
    starts: list[int]
    lengths: list[int]


def pad(rows: Sequence[PluginRow]) -> PaddedStep:
    """The rows, padded to the length of the longest."""
    token_ids = np.zeros((len(rows), max(len(row.token_ids) for row in rows)), np.int32)
    for index, row in enumerate(rows):
        token_ids[index, : len(row.token_ids)] = row.token_ids
    lengths = [len(row.token_ids) for row in rows]
    return PaddedStep([row.slot for row in rows], token_ids, [row.start for row in rows], lengths)


def token_logits(context: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """The logits [V] after a context: noise that depends on all its tokens, and a high logit for the next token."""
    logits: npt.NDArray[np.float32] = _noise(context, VOCAB_SIZE) * np.float32(SPREAD)
    is_letter = np.zeros(VOCAB_SIZE, np.bool_)
    is_letter[LETTERS.start : LETTERS.stop] = True
    logits[~is_letter] += np.float32(UNLIKELY)
    logits[next_token(context)] = CERTAINTY
    return logits


def token_state(context: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """The hidden state [H] after a context."""
    return _noise(context, HIDDEN_SIZE)


def _noise(context: npt.NDArray[np.int32], size: int) -> npt.NDArray[np.float32]:
    """Numbers from -0.5 to 0.5 that depend on all tokens of a context."""
    powers = np.cumprod(np.full(len(context), _MULTIPLIER, np.uint64), dtype=np.uint64)
    state = (powers * (context.astype(np.uint64) + np.uint64(1))).sum(dtype=np.uint64)
    bits = (state ^ np.arange(1, size + 1, dtype=np.uint64) * _MULTIPLIER) * _MULTIPLIER
    noise: npt.NDArray[np.float32] = (bits >> _SHIFT).astype(np.float32) / np.float32(2**24) - np.float32(0.5)
    return noise


def next_token(context: npt.NDArray[np.int32]) -> int:
    """The next byte of the user's last message, then the end token; after the end the message starts again.

    A context without turns, such as one of plain token ids, gets the alphabet.
    """
    answer = _last(context, ASSISTANT)
    question = _last(context[: answer or 0], USER)
    if answer is None or question is None:
        return ord("a") + len(context) % 26
    message = context[question + 1 : answer]
    said: list[int] = message[message < END].tolist()
    return [*said, END][(len(context) - answer - 1) % (len(said) + 1)]


def _last(context: npt.NDArray[np.int32], token_id: int) -> int | None:
    """The last index of a token; None if it is not there."""
    places = np.flatnonzero(context == token_id)
    return int(places[-1]) if len(places) else None
