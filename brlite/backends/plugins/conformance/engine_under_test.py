"""An engine under test: fills slots as its capabilities allow, and compares logits.

Uses the contract only, no particular engine. The checks are in `checks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from brlite.backends.plugins.calls import chunks, plan_calls, with_every_slot
from brlite.backends.plugins.contract import (
    Capabilities,
    PluginEngine,
    PluginRow,
    RowRefused,
    TokenIds,
    with_static_context,
)
from brlite.backends.plugins.discovery import check_capabilities
from brlite.config.options import EngineConfig, ModelSpec
from brlite.errors import BrliteError, ConfigError

MIN_MODEL_LEN = 32

Logit = npt.NDArray[np.float32] | npt.NDArray[np.float16]  # of one row [V]


class CheckFailed(BrliteError):
    """The engine breaks a promise of the contract: `str(error)` describes it."""


class NotApplicable(BrliteError):
    """The check does not apply: the engine does not claim this, or has too few slots or positions."""


class EngineUnderTest:
    """One engine, and the expected lengths of its slots."""

    def __init__(self, make: Callable[[], PluginEngine], spec: ModelSpec, config: EngineConfig) -> None:
        self._make, self._spec, self._config = make, with_static_context(spec), config
        self.engine = make()
        self.capabilities: Capabilities = self._opened()

    def reopen(self, *, is_new: bool) -> None:
        """Close the engine and open it again, or a new one of its kind."""
        self.engine.close()
        if is_new:
            self.engine = self._make()
        self.capabilities = self._opened()

    def close(self) -> None:
        self.engine.close()

    def clear(self) -> None:
        """Release every slot."""
        for slot in range(self.capabilities.max_seqs):
            self.release(slot)

    def release(self, slot: int) -> None:
        self.engine.release(slot)
        self.lengths[slot] = 0

    def feed(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, Logit]:
        """Extend slots by tokens, in as few calls as the engine allows. Returns the last logits of each slot."""
        pieces = {slot: chunks(np.array(token_ids, np.int32), self.capabilities) for slot, token_ids in tokens.items()}
        found: dict[int, Logit] = {}
        for index in range(max(map(len, pieces.values()))):
            rows = [self.row(slot, each[index]) for slot, each in pieces.items() if index < len(each)]
            for group in plan_calls(rows, self.capabilities):
                found |= self.step(group)
        return found

    def alone(self, slot: int, token_ids: Sequence[int]) -> Logit:
        """Extend one slot by tokens. Returns its last logits."""
        return self.feed({slot: token_ids})[slot]

    def row(self, slot: int, token_ids: TokenIds | Sequence[int]) -> PluginRow:
        """A row that starts at the end of the slot."""
        return PluginRow(slot, self.lengths[slot], np.array(token_ids, np.int32))

    def step(self, rows: Sequence[PluginRow]) -> dict[int, Logit]:
        """Call the engine once. Returns the logits of the rows with tokens, by slot."""
        padded = with_every_slot(rows, self.capabilities)
        logits = self.engine.step(padded)
        for row in rows:
            self.lengths[row.slot] = row.end
        return {row.slot: row_logits for row, row_logits in zip(padded, logits, strict=True) if len(row.token_ids)}

    def expect_refusal(self, what: str, rows: Sequence[PluginRow]) -> None:
        """Fail unless the engine raises `RowRefused` with a message for these rows."""
        try:
            self.engine.step(with_every_slot(rows, self.capabilities))
        except RowRefused as error:
            if not str(error).strip():
                raise CheckFailed(f"{what} is refused without a word") from None
        except Exception as error:  # any other exception breaks the contract
            raise CheckFailed(f"{what} raises {type(error).__name__} in place of RowRefused: {error}") from None
        else:
            raise CheckFailed(f"{what} is computed as if it were right")

    def prompt(self, length: int, *, salt: int = 0) -> list[int]:
        """Token ids, the same in every run; fewer than `length` if a slot, minus a few tokens, cannot hold so many."""
        random = np.random.default_rng((length, salt))
        room = max(2, self.capabilities.max_model_len - 8)
        token_ids: list[int] = random.integers(0, self.capabilities.vocab_size, min(length, room)).tolist()
        return token_ids

    def need_two_slots(self) -> None:
        if self.capabilities.max_seqs < 2:
            raise NotApplicable(f"needs 2 slots, and it has {self.capabilities.max_seqs}")

    def need(self, capability: str) -> None:
        if not getattr(self.capabilities, capability):
            raise NotApplicable(f"{capability} is not claimed")

    def same(self, what: str, found: Logit, expected: Logit, *, is_repeated: bool = False) -> float:
        """The difference of two rows as a share of their magnitude. Fails if it is above the tolerance.

        A batch-invariant engine must give the same bits; where the same steps `is_repeated`, a deterministic one too.
        """
        if self.capabilities.is_batch_invariant or (is_repeated and self.capabilities.is_deterministic):
            if not np.array_equal(found, expected):
                raise CheckFailed(f"{what}: not the same bits; they differ by {_difference(found, expected):.2g}")
            return 0.0
        difference = _difference(found, expected)
        if not difference <= self.capabilities.tolerance:
            raise CheckFailed(
                f"{what}: logits differ by {difference:.2g}, tolerated is {self.capabilities.tolerance:g}"
            )
        return difference

    def _opened(self) -> Capabilities:
        capabilities = self.engine.open(self._spec, self._config)
        check_capabilities(capabilities, self._spec)
        if capabilities.max_model_len < MIN_MODEL_LEN:
            raise ConfigError(f"build_seq is {capabilities.max_model_len}; checking an engine takes {MIN_MODEL_LEN}")
        self.lengths = [0] * capabilities.max_seqs
        return capabilities


def _difference(found: Logit, expected: Logit) -> float:
    one, other = found.astype(np.float64), expected.astype(np.float64)
    magnitude = max(float(np.abs(one).max()), float(np.abs(other).max())) or 1.0
    return float(np.abs(one - other).max()) / magnitude
