"""Stand-ins for a model and a tokenizer: deterministic, instant, and strict about what the engine tells them."""

from __future__ import annotations

import threading
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from brlite.backends.pooling import pooled_result
from brlite.backends.sampling.logits_processors import run_processors
from brlite.chat.turns import joined_text
from brlite.engine.backend import (
    BackendInfo,
    Batch,
    SampledToken,
    SamplingInput,
    ScheduledSeq,
    SeqResult,
    StepResult,
    Undrawn,
)
from brlite.engine.outputs import TokenLogprob
from brlite.errors import InvalidRequest
from brlite.tokenizer.infill import InfillText, InfillTokens
from tests.limits import PATIENCE_SECONDS

VOCAB_SIZE = 260
EOS = 256
BLOCK_SIZE = 4
HIDDEN_SIZE = 4


class ByteTokenizer:
    """One token a byte; 256 is the end of sequence. Chat messages become `role:content` lines."""

    vocab_size = VOCAB_SIZE
    bos_token_id = None
    eos_token_ids = (EOS,)
    special_token_ids = frozenset(range(256, VOCAB_SIZE))

    def __init__(self, *, has_chat_template: bool = True) -> None:
        self.has_chat_template = has_chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True, param: str | None = None) -> list[int]:
        return list(text.encode())

    infill: InfillTokens | None = InfillTokens(257, 258, 259, ends=(120,))  # an "x" ends an infill

    def encode_infill(self, text: InfillText, *, add_special_tokens: bool = True) -> list[int]:
        assert self.infill is not None
        prompt = self.infill.prompt(list(text.before.encode()), list(text.after.encode())) + list(text.start.encode())
        return (self.infill.context(text.files, lambda part: list(part.encode())) if text.files else []) + prompt

    encodes_in_process = True

    def encode_continuation(self, text: str) -> list[int]:
        return list(text.encode())

    def fewest_tokens(self, text: str) -> int:
        return len(text)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return b"".join(map(self.token_bytes, token_ids)).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else f"<{token_id}>".encode()

    def token_text(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode(errors="replace")

    def whole_text(self, token_id: int) -> str | None:
        data = self.token_bytes(token_id)
        text = data.decode(errors="ignore")
        return text if text.encode() == data else None

    chat_template_text = "{{ messages }}"
    chat_format = None

    def special_token_id(self, text: str) -> int | None:
        return next((token_id for token_id in self.special_token_ids if self.token_text(token_id) == text), None)

    def close(self) -> None:
        """Nothing was opened."""

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extras: object = None,
    ) -> str:
        if not self.has_chat_template:
            raise InvalidRequest(
                "Error in applying chat template from request: the model has none; use /v1/completions",
                param="messages",
            )
        texts = [joined_text(message["content"]) for message in messages]
        text = "".join(f"{message['role']}:{content}\n" for message, content in zip(messages, texts, strict=True))
        return text[:-1] if continue_final_message else text

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> list[int]:
        return self.encode(self.render_chat(messages, add_generation_prompt=add_generation_prompt))


def printable_token(context: Sequence[int], seed: int) -> int:
    """A letter that depends on every token of the context and, as a seeded sampler's would, on the seed."""
    digest = blake2b(repr((list(context), seed)).encode(), digest_size=2).digest()
    return 97 + int.from_bytes(digest, "little") % 26


def repeating_token(context: Sequence[int], seed: int) -> int:
    """One of three letters: most often a function of the last two, so that the text goes round for a while."""
    digest = blake2b(repr((list(context), seed)).encode(), digest_size=2).digest()
    if digest[0] < 32:
        return 97 + digest[1] % 3
    return 97 + (2 * context[-1] + sum(context[-2:-1]) + seed) % 3


def hidden_state(context: Sequence[int]) -> list[float]:
    """Whole numbers, whose sums are exact, that depend on every token of the context."""
    return [float(byte - 128) for byte in blake2b(repr(list(context)).encode(), digest_size=HIDDEN_SIZE).digest()]


class FakeBackend:
    """A model whose next token is a function of its whole context, which it reads back through the block table.

    Keeps the tokens themselves where a model keeps keys and values: any slip in paging, prefix caching or preemption
    changes the text. `fault` may raise for a batch, or return an error for a sequence. With `max_draft_tokens` it
    verifies drafts; what wrong ones wrote into its cache stays there. With `can_run_ahead` a step that was launched is
    computed when its result is fetched, as late as on any device. Logits processors get 1 for its token, 0 for others.
    """

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        max_num_seqs: int = 4,
        max_model_len: int = 64,
        block_size: int = BLOCK_SIZE,
        max_draft_tokens: int = 0,
        fingerprint: str = "fake",
        hidden_size: int = HIDDEN_SIZE,
        pooling: Literal["last", "mean", "none"] = "last",
        matryoshka_dimensions: tuple[int, ...] = (),
        can_run_ahead: bool = False,
        runs_logits_processors: bool = True,
        next_token: Callable[[Sequence[int], int], int] = printable_token,
        fault: Callable[[ScheduledSeq], str | None] = lambda seq: None,
        logprob: Callable[[int], float] = lambda token_id: -0.5,
    ) -> None:
        self.info = BackendInfo(
            name="fake",
            device="none",
            dtype="none",
            precision="bf16",
            vocab_size=VOCAB_SIZE,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            block_size=block_size,
            num_blocks=num_blocks,
            kv_dtype="none",
            weight_bytes=0,
            kv_bytes=0,
            max_draft_tokens=max_draft_tokens,
            fingerprint=fingerprint,
            is_batch_invariant=True,
            hidden_size=hidden_size,
            pooling=pooling,
            matryoshka_dimensions=matryoshka_dimensions,
            can_run_ahead=can_run_ahead,
            runs_logits_processors=runs_logits_processors,
        )
        self.batches: list[Batch] = []
        self.is_closed = False
        self.gate: threading.Event | None = None
        self.has_begun = threading.Event()
        self.next_token = next_token
        self._fault = fault
        self._logprob_of = logprob
        self._cache = [[-1] * block_size for _ in range(num_blocks)]
        self.num_launched_ahead = 0
        self._launched: deque[Batch] = deque()
        self._last_drawn: dict[int, int] = {}  # by the step before
        self._failed: set[int] = set()  # sequences that a step failed for: the result of the step ahead is not used

    def execute(self, batch: Batch) -> StepResult:
        self.has_begun.set()
        if self.gate is not None:
            self.gate.wait(timeout=PATIENCE_SECONDS)
        self.batches.append(batch)
        assert len({seq.seq_id for seq in batch.seqs}) == len(batch.seqs) <= self.info.max_num_seqs
        try:
            errors = {seq.seq_id: self._fault(seq) for seq in batch.seqs}
        except Exception:
            self._failed.update(seq.seq_id for seq in batch.seqs)
            raise
        self._failed.update(seq_id for seq_id, error in errors.items() if error is not None)
        return StepResult([self._compute(batch, seq, errors[seq.seq_id]) for seq in batch.seqs])

    def launch(self, batch: Batch) -> Callable[[], StepResult]:
        assert len(self._launched) <= 1
        for under_way in self._launched:
            self._check_blocks(under_way, batch)
            self.num_launched_ahead += 1
        followed = {seq.seq_id for under_way in self._launched for seq in under_way.seqs if seq.sampling is not None}
        if self._launched:  # else the launch before has failed
            assert followed.issuperset(seq.seq_id for seq in batch.seqs if seq.takes_last_draw)
        self._launched.append(batch)
        return lambda: self._fetch(batch)

    def _fetch(self, batch: Batch) -> StepResult:
        assert self._launched.popleft() is batch, "results are fetched in order"
        drawn, self._last_drawn = self._last_drawn, {}
        seqs = [seq.with_last_draw(drawn.get(seq.seq_id, 0)) if seq.takes_last_draw else seq for seq in batch.seqs]
        result = self.execute(Batch(seqs, batch.masks, batch.processors))
        self._last_drawn = {seq.seq_id: seq.tokens[-1].token_id for seq in result.seqs if seq.tokens}
        return result

    def _check_blocks(self, under_way: Batch, batch: Batch) -> None:
        """What a step under way writes to is no other sequence's."""
        size = self.info.block_size
        for writer in under_way.seqs:
            last = (writer.start + len(writer.token_ids) - 1) // size
            written = set(writer.block_table[writer.start // size : last + 1])
            for seq in batch.seqs:
                assert seq.seq_id == writer.seq_id or written.isdisjoint(seq.block_table)

    def close(self) -> None:
        self.is_closed = True

    def _compute(self, batch: Batch, seq: ScheduledSeq, error: str | None) -> SeqResult:
        if error is not None:
            return SeqResult(seq.seq_id, error=error)
        assert not seq.takes_last_draw
        size = self.info.block_size
        for position, token_id in enumerate(seq.token_ids, seq.start):
            self._cache[seq.block_table[position // size]][position % size] = token_id
        end = seq.start + len(seq.token_ids)
        context = [self._cache[seq.block_table[position // size]][position % size] for position in range(end)]
        prompt_logprobs = [self._logprob(target, seq.num_prompt_logprobs) for target in seq.prompt_targets]
        if seq.pooling is not None:
            assert self.info.hidden_size
            assert seq.sampling is None
            total = array("d", seq.pooling.total or bytes(8 * HIDDEN_SIZE))
            for length in range(end + 1 - seq.pooling.num_tokens, end + 1):
                total = array("d", map(float.__add__, total, hidden_state(context[:length])))
            return pooled_result(seq.seq_id, seq.pooling, np.array(total))
        if seq.sampling is None:
            return SeqResult(seq.seq_id, prompt_logprobs=prompt_logprobs)
        tokens = list(self._draw(batch, seq, seq.sampling, context))
        if not tokens:
            return SeqResult.undrawn(seq.seq_id, Undrawn.NOT_FINITE)
        return SeqResult(seq.seq_id, tokens, prompt_logprobs)

    def _draw(
        self, batch: Batch, seq: ScheduledSeq, sampling: SamplingInput, context: list[int]
    ) -> Iterator[SampledToken]:
        """The token after the last real one and, as long as the draft is right, those after each of them.

        Where a mask does not allow it, the lowest token that the mask allows, or none.
        """
        if batch.masks is not None:
            batch.masks.wait()
        assert seq.num_draft_tokens <= self.info.max_draft_tokens
        assert not seq.num_draft_tokens or not (sampling.output_counts or sampling.banned_token_ids)
        num_real = len(context) - seq.num_draft_tokens
        if sampling.output_counts and sampling.params.repeat_last_n < 0 and seq.seq_id not in self._failed:
            counts = zip(array("i", sampling.counted_token_ids), array("i", sampling.output_counts), strict=True)
            prompt, output = context[: num_real - sampling.position], context[num_real - sampling.position : num_real]
            expected = dict.fromkeys(prompt, 0) | Counter(output)
            assert dict(counts) == expected, "each drawn token is counted"
        for length in range(num_real, len(context) + 1):
            token_id = self.next_token(context[:length], 0 if sampling.params.is_greedy else sampling.seed)
            token_id = ord("a") if token_id in sampling.banned_token_ids else token_id
            mask = batch.mask_of(seq.seq_id, length - num_real)
            if mask is not None and not mask.allows(token_id):
                allowed = list(filter(mask.allows, range(self.info.vocab_size)))
                if not allowed:
                    return
                token_id = allowed[0]
            if batch.processors is not None and seq.seq_id in batch.processors:
                assert not seq.num_draft_tokens
                logits = np.zeros(self.info.vocab_size, np.float32)
                logits[token_id] = 1
                edited = run_processors(batch.processors[seq.seq_id], logits)
                if edited is None:
                    return
                token_id = int(edited.argmax())
            num_top = sampling.params.logprobs
            yield SampledToken(token_id, None if num_top is None else self._logprob(token_id, num_top))
            if context[length : length + 1] != [token_id]:
                return

    def _logprob(self, token_id: int, num_top: int) -> TokenLogprob:
        own = self._logprob_of(token_id)
        return TokenLogprob(token_id, own, tuple(((token_id + i) % 256, own - i) for i in range(num_top)))


def reference_tokens(
    prompt: Sequence[int],
    num_tokens: int,
    *,
    seed: int = 0,
    next_token: Callable[[Sequence[int], int], int] = printable_token,
) -> list[int]:
    """What `FakeBackend` must answer, computed alone, from the whole context each time."""
    context = list(prompt)
    for _ in range(num_tokens):
        context.append(next_token(context, seed))
    return context[len(prompt) :]
