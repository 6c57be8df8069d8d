"""Beam search: a step extends all beams, keeps the most probable continuations, and collects ended ones as answers.

The definition is that of transformers' `generate(num_beams=...)` without sampling (`_beam_search`). vLLM 0.4 differs in
details; it counts the prompt's tokens in an answer's length. Log probabilities come from the steps' results. The search
uses no blocks or batches: a beam is named by the id of the sequence that computes it.
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Collection, Mapping
from typing import NamedTuple

from brlite.engine.detokenizer import Detokenizer
from brlite.engine.outputs import CompletionOutput, TokenLogprob
from brlite.errors import InvalidRequest
from brlite.sampling_params import FinishReason, SamplingParams


class Hypothesis(NamedTuple):
    """The answer of a beam so far, or an ended answer. `logprob` is the sum of its tokens' logprobs."""

    detokenizer: Detokenizer
    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0
    entries: tuple[TokenLogprob, ...] = ()
    text: str = ""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class Continuation(NamedTuple):
    """A beam with one more token. `seq_id` is the sequence that computed the tokens before it."""

    seq_id: int
    hypothesis: Hypothesis


class BeamSearch:
    """The search of one request. Each step: `go_on` with the beams, `take` for each of them, `advance`.

    An answer's score is its logprob divided by its length to the power `length_penalty`. A continuation that ends is an
    answer only if it is among the best `width` of its step. The search is over when no beam is left. It is also over
    when there are `width` answers and `early_stopping` is true, or the best beam's score is not above theirs. That
    score is taken at the beam's length; with "never" and a penalty above 0, at `max_tokens`.
    """

    def __init__(self, params: SamplingParams, max_tokens: int, end_token_ids: Collection[int]) -> None:
        """`end_token_ids` are those that end an answer; they are left out before `min_tokens`."""
        self.width = params.beam_width
        self.num_tokens = 0  # drawn for all beams so far
        self._params = params
        self._max_tokens = max_tokens
        self._end_token_ids = frozenset(end_token_ids)
        self._beams: dict[int, Hypothesis] = {}  # best first
        self._drawn: dict[int, TokenLogprob] = {}
        self._ended: list[Hypothesis] = []  # best first

    @property
    def num_logprobs(self) -> int:
        """How many of a beam's best tokens a step must report: `width` and the number of tokens that end an answer."""
        return max(self.width + len(self._end_token_ids), self._params.logprobs or 0)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise `InvalidRequest` where a step could have fewer candidates than there are beams."""
        most = vocab_size - len(self._end_token_ids)
        if self.width > most:
            raise InvalidRequest(
                f"best_of must be at most {most} with use_beam_search, as many tokens as this model has beside those "
                f"that end an answer, got {self.width}",
                param="best_of",
            )

    def go_on(self, beams: Mapping[int, Hypothesis]) -> None:
        """Set the beams, best first, by the sequences that compute them."""
        self._beams, self._drawn = dict(beams), {}

    def take(self, seq_id: int, drawn: TokenLogprob) -> None:
        """Note the best tokens after a beam."""
        self._drawn[seq_id] = drawn
        self.num_tokens += 1

    def has_drawn(self, seq_id: int) -> bool:
        """Whether the best tokens after this beam are known."""
        return seq_id in self._drawn

    @property
    def is_complete(self) -> bool:
        """Whether the best tokens after all beams are known."""
        return len(self._drawn) == len(self._beams)

    def advance(self) -> list[Continuation]:
        """The beams of the next step, best first; none when the search is over."""
        num_tokens = 1 + len(next(iter(self._beams.values())).token_ids)
        excluded = self._end_token_ids if num_tokens <= self._params.min_tokens else frozenset[int]()
        candidates = [
            (beam.logprob + logprob, seq_id, token_id, logprob)
            for seq_id, beam in self._beams.items()
            for token_id, logprob in self._drawn[seq_id].top
            if token_id not in excluded
        ]
        beams: list[Continuation] = []
        num_ranked = self.width + len(self._end_token_ids) * len(self._beams)
        ranked = heapq.nlargest(num_ranked, candidates, key=lambda each: each[0])
        for rank, (_, seq_id, token_id, logprob) in enumerate(ranked):
            child = self._extended(seq_id, token_id, logprob)
            if child.finish_reason is None:
                beams.append(Continuation(seq_id, child))
            elif rank < self.width:
                self._ended.append(child)
            if len(beams) == self.width:
                break
        self._ended = sorted(self._ended, key=self._score, reverse=True)[: self.width]
        if not beams or self._has_best_answers(beams[0].hypothesis):
            self._beams, beams = {}, []
        return beams

    def best(self) -> list[Hypothesis]:
        """The `n` best answers. Before the search is over they may be beams, which end as "abort"."""
        cut = [beam._replace(finish_reason="abort") for beam in self._beams.values() if beam.token_ids]
        found = self._ended if len(self._ended) == self.width else [*self._ended, *cut]
        return sorted(found, key=self._score, reverse=True)[: self._params.n]

    def completion(self, index: int, hypothesis: Hypothesis) -> CompletionOutput:
        """An answer as a `CompletionOutput`."""
        return CompletionOutput(
            index=index,
            text=hypothesis.text,
            token_ids=list(hypothesis.token_ids),
            logprobs=None if self._params.logprobs is None else list(hypothesis.entries),
            finish_reason=hypothesis.finish_reason,
            stop_reason=hypothesis.stop_reason,
        )

    def _extended(self, seq_id: int, token_id: int, logprob: float) -> Hypothesis:
        beam = self._beams[seq_id]
        detokenizer = copy.copy(beam.detokenizer)  # its state is immutable values
        text = beam.text + detokenizer.push(token_id)
        entries = beam.entries
        if self._params.logprobs is not None:
            top = self._drawn[seq_id].top[: self._params.logprobs]
            entries = (*entries, TokenLogprob(token_id, logprob, top))
        return Hypothesis(
            detokenizer,
            (*beam.token_ids, token_id),
            beam.logprob + logprob,
            entries,
            text,
            detokenizer.finish_reason,
            detokenizer.stop_reason,
        )

    def _has_best_answers(self, best: Hypothesis) -> bool:
        """Whether there are enough answers, and `early_stopping` does not let the best beam replace one of them."""
        if len(self._ended) < self.width:
            return False
        if self._params.early_stopping is True:
            return True
        penalty = self._params.length_penalty
        is_hopeful = self._params.early_stopping == "never" and penalty > 0
        length = self._max_tokens if is_hopeful else len(best.token_ids)
        return bool(best.logprob / length**penalty <= self._score(self._ended[-1]))

    def _score(self, hypothesis: Hypothesis) -> float:
        return float(hypothesis.logprob / len(hypothesis.token_ids) ** self._params.length_penalty)
