"""Prompt lookup (n-grams): drafts the tokens that followed an earlier occurrence of the last two or three tokens.

Uses token ids only: no blocks, no requests, no model. `drafting.py` decides whether its drafts pay.
"""

from __future__ import annotations

INITIAL_ACCEPTANCE = 0.2
NEWEST_WEIGHT = 0.2  # of the last draft token in `acceptance`: a right one starts drafting, a few wrong ones end it
MAX_NEW_TOKENS = 512  # indexed in one call, under a millisecond: a long prompt does not block the event loop


class NgramDrafter:
    """One sequence's drafts, from an index of its own n-grams that costs about a microsecond a token.

    Every token is compared with the draft token for it, even if that was not used. So `acceptance`, the share of right
    draft tokens, is measured without a trial: drafting starts as soon as a text repeats itself, and not before.
    """

    def __init__(self, num_prompt_tokens: int) -> None:
        self.acceptance = INITIAL_ACCEPTANCE
        self._num_prompt_tokens = num_prompt_tokens
        self._num_seen = 0
        self._last_two = (-1, -1)
        self._ends: dict[tuple[int, ...], int] = {}  # two or three tokens → the index after their last occurrence
        self._source: int | None = None  # the index whose token is expected again

    def follow(self, token_ids: list[int]) -> bool:
        """Index the tokens since the last call, at most `MAX_NEW_TOKENS`. Returns whether there is a draft now."""
        begin, source, ends, (first, second) = self._num_seen, self._source, self._ends, self._last_two
        end = min(len(token_ids), begin + MAX_NEW_TOKENS)
        for position in range(begin, end):
            token_id = token_ids[position]
            if position == self._num_prompt_tokens:
                self.acceptance = INITIAL_ACCEPTANCE  # repetitions in the prompt do not predict any in the answer
            if source is not None:
                is_right = token_ids[source] == token_id
                self.acceptance += NEWEST_WEIGHT * (is_right - self.acceptance)
                source = source + 1 if is_right else None
            pair, triple = (second, token_id), (first, second, token_id)
            if source is None:
                source = ends.get(triple) or ends.get(pair)
            ends[pair] = ends[triple] = position + 1
            first, second = pair
        self._num_seen, self._source, self._last_two = end, source, (first, second)
        return source is not None and end == len(token_ids)

    def draft(self, token_ids: list[int], num_tokens: int) -> list[int]:
        """A draft of `num_tokens` tokens; at the end of the text they repeat. Call it after `follow` returned True."""
        assert self._source is not None, "follow says when there is none"
        draft = token_ids[self._source : self._source + num_tokens]
        period = len(token_ids) - self._source
        for index in range(period, num_tokens):
            draft.append(draft[index - period])
        return draft
