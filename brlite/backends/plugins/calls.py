"""Which calls of an engine one step takes: rows that it cannot compute together come in calls of their own.

Pure decisions over rows and capabilities; computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from brlite.backends.plugins.contract import Capabilities, PluginRow, TokenIds

NO_TOKENS: TokenIds = np.zeros(0, np.int32)


def plan_calls(rows: Sequence[PluginRow], capabilities: Capabilities) -> list[list[PluginRow]]:
    """The rows in groups that the engine takes together, decodes first: they keep streams going."""
    decodes = [row for row in rows if not row.is_prompt]
    prompts = [row for row in rows if row.is_prompt]
    groups = [prompts] if capabilities.can_prefill_together else [[row] for row in prompts]
    if capabilities.can_mix_rows and groups:
        groups[0] = decodes + groups[0]
    else:
        groups.insert(0, decodes)
    return [group for group in groups if group]


def with_every_slot(rows: Sequence[PluginRow], capabilities: Capabilities) -> list[PluginRow]:
    """The rows as a call takes them: where it wants every slot, those that are idle are added, and all are in order."""
    if not capabilities.needs_every_slot:
        return list(rows)
    by_slot = {row.slot: row for row in rows}
    return [by_slot.get(slot) or PluginRow(slot, 0, NO_TOKENS) for slot in range(capabilities.max_seqs)]


def chunks(token_ids: TokenIds, capabilities: Capabilities) -> list[TokenIds]:
    """The tokens in rows that are not too long for the engine."""
    size = capabilities.longest_row
    return [token_ids[start : start + size] for start in range(0, len(token_ids), size)]
