"""Follows one answer through its grammar, token by token: which tokens may come next, which one must, is it complete.

A matcher belongs to one sequence and is used by one thread at a time. Errors of the library end the answer that they
happen in: they are kept in `error` and never raised.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import llguidance
    import numpy as np
    import numpy.typing as npt

MAX_DIGITS = 20  # of a JSON number, before its point and after it
MAX_EXPONENT_DIGITS = 2
MAX_TAIL = MAX_DIGITS + 4  # bytes that show whether a number is long
MAX_FORCED = 256  # tokens that are known ahead at a time
TOO_COMPLEX = "the grammar became too complex to follow"
_LONG_NUMBER = re.compile(rb"([0-9]{%d}|[0-9][eE][-+]?[0-9]{%d})\Z" % (MAX_DIGITS, MAX_EXPONENT_DIGITS))


class Matcher(Protocol):
    """What the engine holds for each sequence whose answer has a grammar."""

    @property
    def error(self) -> str | None:
        """Why the answer cannot go on."""
        ...

    @property
    def num_tokens(self) -> int:
        """How many tokens the matcher has taken in."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow: the answer ends here, without an end-of-text token."""
        ...

    @property
    def forced(self) -> Sequence[int]:
        """The tokens that come next, whatever the model says. The first is the only one that the mask allows."""
        ...

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take in tokens that were drawn, up to one after which the answer is complete."""
        ...

    def fill_masks(self, words: memoryview, draft_token_ids: Sequence[int]) -> None:
        """Write the mask of the next draw, and of the one after each guess, into rows of `words` (int32), all 0.

        The rows after a guess that is not allowed stay 0: nothing is drawn there.
        """
        ...


class NumberTokens:
    """Finds JSON numbers that go on for ever, by the digits that the text ends in and by what may follow them.

    Inside a number neither a quote nor a letter may come next but `e`. So digits of strings and of free text are left
    alone.
    """

    def __init__(self, token_bytes: Sequence[bytes], row_words: int) -> None:
        import numpy as np

        def mask(first_bytes: bytes) -> npt.NDArray[np.int32]:
            bits = np.zeros(row_words * 32, np.bool_)
            bits[[token_id for token_id, data in enumerate(token_bytes) if data[:1] and data[0] in first_bytes]] = True
            return np.packbits(bits, bitorder="little").view(np.int32)

        self.digits = mask(b"0123456789")  # [row_words]
        self._text = mask(b'"a')

    def bound(self, row: npt.NDArray[np.int32], tail: bytes) -> None:
        """Take the digits out of a mask if the number that `tail` ends in has all that it may have."""
        if _LONG_NUMBER.search(tail) is None or (row & self._text).any():
            return
        others = row & ~self.digits
        if others.any():  # else the schema itself wants the digits: a constant, a bound
            row[:] = others


class GuidedMatcher:
    """A `Matcher` over one of llguidance's.

    A run of forced tokens is settled when it begins and then followed to its end, so that an answer is the same whether
    its tokens come one a step or several.
    """

    def __init__(
        self,
        inner: llguidance.LLMatcher,
        token_bytes: Sequence[bytes],
        *,
        has_forced_tokens: bool,
        number_tokens: NumberTokens | None,
    ) -> None:
        """`number_tokens` bounds the numbers of JSON; None where there are none."""
        self.error: str | None = None
        self.num_tokens = 0
        self._inner = inner
        self._token_bytes = token_bytes
        self._has_forced_tokens = has_forced_tokens
        self._number_tokens = number_tokens
        self._tail = b""  # the last bytes of the answer
        self._forced: deque[int] = deque()
        self._note_error()
        self._force()

    @property
    def is_complete(self) -> bool:
        return self.error is None and self._inner.is_stopped()

    @property
    def forced(self) -> Sequence[int]:
        return self._forced

    def advance(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if self.error is not None or self._inner.is_stopped():
                return
            self._inner.consume_token(token_id)
            self.num_tokens += 1
            self._note_error()
            if self.error is not None:
                return
            self._tail = (self._tail + self._token_bytes[token_id])[-MAX_TAIL:]
            if self._forced and self._forced.popleft() != token_id:
                self._forced.clear()
            if not self._forced:
                self._force()

    def fill_masks(self, words: memoryview, draft_token_ids: Sequence[int]) -> None:
        import numpy as np

        if self.error is not None:
            return
        rows = np.frombuffer(words, np.int32).reshape(1 + len(draft_token_ids), -1)
        tail, forced, num_taken = self._tail, deque(self._forced), 0
        for draw, row in enumerate(rows):
            if forced:
                row.view("uint32")[forced[0] // 32] = 1 << forced[0] % 32
            elif not self._fill(row, tail):
                break
            if draw == len(draft_token_ids):
                break
            token_id = draft_token_ids[draw]
            if not row[token_id // 32] >> (token_id % 32) & 1 or not self._inner.consume_token(token_id):
                break
            num_taken += 1
            tail = (tail + self._token_bytes[token_id])[-MAX_TAIL:]
            if forced:
                forced.popleft()
            if self._inner.is_stopped():
                rows[draw + 1 :] = -1  # the answer ends before these draws: what they give is dropped
                break
            if not forced:
                forced.extend(self._next_forced())
        if num_taken:
            self._inner.rollback(num_taken)
        self._note_error()

    def _fill(self, row: npt.NDArray[np.int32], tail: bytes) -> bool:
        """Whether there is a token that may come next."""
        self._inner.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._inner.is_error():
            row[:] = 0
            return False
        if self._number_tokens is not None:
            self._number_tokens.bound(row, tail)
        return bool(row.any())

    def _force(self) -> None:
        if self.error is None and not self._inner.is_stopped():
            self._forced.extend(self._next_forced())
            self._note_error()

    def _next_forced(self) -> list[int]:
        return self._inner.compute_ff_tokens()[:MAX_FORCED] if self._has_forced_tokens else []

    def _note_error(self) -> None:
        if self.error is None and self._inner.is_error():
            message = self._inner.get_error().partition("\n")[0][:200]
            self.error = f"{TOO_COMPLEX}: {message}" if message else TOO_COMPLEX
