"""The lengths of an engine's slots, and checks of a step's rows against them, for engines without checks of their own.

Refuses rows that the contract forbids, with the reason. Computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from brlite.backends.plugins.contract import Capabilities, PluginRow, RowRefused


class Slots:
    """How many tokens each slot holds."""

    def __init__(self, capabilities: Capabilities) -> None:
        self._capabilities = capabilities
        self.lengths = [0] * capabilities.max_seqs

    def check(self, rows: Sequence[PluginRow]) -> None:
        """Raise `RowRefused` for rows that the slots or the capabilities do not allow. Changes nothing."""
        limits, numbers = self._capabilities, [row.slot for row in rows]
        if limits.needs_every_slot and numbers != list(range(len(self.lengths))):
            raise RowRefused(f"a step needs a row for each of the {len(self.lengths)} slots, in their order")
        if len(set(numbers)) < len(numbers):
            raise RowRefused("a slot stands twice in a step")
        for row in rows:
            self._check_number(row.slot)
            held, num_tokens = self.lengths[row.slot], len(row.token_ids)
            if num_tokens == 0:
                if limits.needs_every_slot:
                    continue
                raise RowRefused(f"slot {row.slot}: a row without tokens")
            if row.start != held:
                raise RowRefused(f"slot {row.slot} holds {held} tokens; a row cannot start at {row.start}")
            if row.end > limits.max_model_len:
                found = f"would hold {row.end} tokens; a slot holds {limits.max_model_len} at most"
                raise RowRefused(f"slot {row.slot} {found}")
            if num_tokens > limits.longest_row:
                raise RowRefused(f"slot {row.slot}: a row of {num_tokens} tokens; allowed are {limits.longest_row}")
            if num_tokens > 1 and row.start > 0 and not limits.can_chunk_prompts:
                raise RowRefused(f"slot {row.slot}: a prompt comes whole, not from position {row.start} on")
            if row.token_ids.min() < 0 or row.token_ids.max() >= limits.vocab_size:
                raise RowRefused(f"slot {row.slot}: a token id outside 0 to {limits.vocab_size - 1}")
        busy = [row for row in rows if len(row.token_ids)]
        num_prompts = sum(row.is_prompt for row in busy)
        if num_prompts > 1 and not limits.can_prefill_together:
            raise RowRefused(f"{num_prompts} prompts in one step; allowed is 1")
        if 0 < num_prompts < len(busy) and not limits.can_mix_rows:
            raise RowRefused("prompts and decodes in one step")

    def extend(self, rows: Sequence[PluginRow]) -> None:
        """Add the tokens of computed rows to their slots."""
        for row in rows:
            if len(row.token_ids):
                self.lengths[row.slot] = row.end

    def release(self, slot: int) -> None:
        """Set a slot's length to 0. Raises `RowRefused` if there is no such slot."""
        self._check_number(slot)
        self.lengths[slot] = 0

    def _check_number(self, slot: int) -> None:
        if not 0 <= slot < len(self.lengths):
            raise RowRefused(f"there is no slot {slot}; allowed are 0 to {len(self.lengths) - 1}")
