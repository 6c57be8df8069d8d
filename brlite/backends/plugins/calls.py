"""Splits a step into calls of the engine: rows that it cannot compute together go into separate calls. And checks the
arrays that it returns.

Pure functions of rows and capabilities; computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from brlite.backends.plugins.contract import Capabilities, PluginRow, TokenIds

NO_TOKENS: TokenIds = np.zeros(0, np.int32)


def plan_calls(rows: Sequence[PluginRow], capabilities: Capabilities) -> list[list[PluginRow]]:
    """The rows in groups that the engine can compute in one call, decodes first, so that streams do not stall."""
    decodes = [row for row in rows if not row.is_prompt]
    prompts = [row for row in rows if row.is_prompt]
    groups = [prompts] if capabilities.can_prefill_together else [[row] for row in prompts]
    if capabilities.can_mix_rows and groups:
        groups[0] = decodes + groups[0]
    else:
        groups.insert(0, decodes)
    return [group for group in groups if group]


def with_every_slot(rows: Sequence[PluginRow], capabilities: Capabilities) -> list[PluginRow]:
    """The rows of a call. If the engine needs every slot, idle slots are added and all are sorted by slot."""
    if not capabilities.needs_every_slot:
        return list(rows)
    by_slot = {row.slot: row for row in rows}
    return [by_slot.get(slot) or PluginRow(slot, 0, NO_TOKENS) for slot in range(capabilities.max_seqs)]


def find_fault(array: object, dtype: str, shape: tuple[int, int]) -> str | None:
    """What an engine returned in place of an array of this type and shape; None if it is one."""
    if not isinstance(array, np.ndarray):
        return f"{type(array).__name__}; promised are {dtype} {shape}"
    is_right = array.shape == shape and array.dtype == dtype
    return None if is_right else f"{array.dtype} {array.shape}; promised are {dtype} {shape}"


def chunks(token_ids: TokenIds, capabilities: Capabilities) -> list[TokenIds]:
    """The tokens, split into rows that are not too long for the engine."""
    size = capabilities.longest_row
    return [token_ids[start : start + size] for start in range(0, len(token_ids), size)]
