"""A step's sequences with a grammar: fills their masks while the step computes, then advances their matchers.

Runs on threads beside the event loop's. A matcher is used by one of them at a time: a mask is published only when its
matcher is free, and matchers advance only after the draws that waited for the masks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from brlite.engine.backend import StepResult, TokenMasks
from brlite.grammar.matcher import Matcher

logger = logging.getLogger(__name__)


class GuidedSeq(NamedTuple):
    """A sequence that draws in a step, with its draft in that step."""

    seq_id: int
    matcher: Matcher
    draft_token_ids: Sequence[int]


class StepGuidance:
    """Fills the masks of one step and advances the matchers. Never raises: each matcher stores its own error."""

    def __init__(self, vocab_size: int, seqs: Iterable[GuidedSeq]) -> None:
        self._seqs = list(seqs)
        self.masks = TokenMasks(vocab_size, {seq.seq_id: 1 + len(seq.draft_token_ids) for seq in self._seqs})
        self._has_filled = self._has_advanced = False

    def fill(self) -> None:
        """Fill and publish all masks, on another thread than the step's. Does nothing when called again."""
        if self._has_filled:
            return
        self._has_filled = True
        words = memoryview(self.masks.words)
        for seq_id, matcher, draft_token_ids in self._seqs:
            first = self.masks.first_rows[seq_id]
            end = first + 1 + len(draft_token_ids)
            try:
                matcher.fill_masks(words[first * self.masks.row_bytes : end * self.masks.row_bytes], draft_token_ids)
            except Exception:
                logger.exception("the token mask of a sequence could not be computed")
            for row in range(first, end):
                self.masks.publish(row)

    def advance(self, result: StepResult) -> None:
        """Advance each matcher by the tokens of its sequence. Does nothing when called again."""
        if self._has_advanced:
            return
        self._has_advanced = True
        drawn = {seq.seq_id: [token.token_id for token in seq.tokens] for seq in result.seqs}
        for seq_id, matcher, _ in self._seqs:
            matcher.advance(drawn[seq_id])
