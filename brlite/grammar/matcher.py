"""Follows one answer through its grammar: which tokens are allowed next, which are forced, and whether it is complete.

A matcher belongs to one sequence and is used by one thread at a time. An error of the library ends the answer that it
happens in: it is kept in `error` and not raised.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import llguidance
    import numpy as np
    import numpy.typing as npt

MAX_DIGITS = 20  # of a JSON number, before its point and after it
MAX_EXPONENT_DIGITS = 2
MAX_TAIL = MAX_DIGITS + 4  # bytes of the answer that are kept, to find a long number at its end
MAX_FORCED = 256  # the most forced tokens that are computed at once
TOO_COMPLEX = "the grammar became too complex to follow"
_LONG_NUMBER = re.compile(rb"(?:[0-9]{%d}|[0-9][eE][-+]?([0-9]{0,%d}))\Z" % (MAX_DIGITS, MAX_EXPONENT_DIGITS))


class Matcher(Protocol):
    """The state of one answer's grammar. The engine holds one for each sequence whose answer has a grammar."""

    @property
    def error(self) -> str | None:
        """Why the answer cannot be continued; None if it can."""
        ...

    @property
    def num_tokens(self) -> int:
        """How many tokens were given to `advance`."""
        ...

    @property
    def is_complete(self) -> bool:
        """Whether no token can follow. The answer then ends without an end-of-text token."""
        ...

    @property
    def forced(self) -> Sequence[int]:
        """The next tokens, as long as the grammar allows only one. The mask allows only the first of them."""
        ...

    def advance(self, token_ids: Sequence[int]) -> None:
        """Advance by tokens that were drawn. Tokens after the one that completes the answer are ignored."""
        ...

    def fill_masks(self, words: memoryview, draft_token_ids: Sequence[int]) -> None:
        """Write the masks of the next draw and of the draw after each draft token into `words`: int32, one row a draw.

        All rows must be 0. Rows after a draft token that is not allowed stay 0: no token is drawn there.
        """
        ...


class Grammar:
    """A compiled grammar. Each answer gets a matcher of its own."""

    def __init__(self, make: Callable[[], Matcher], first_mask: bytes) -> None:
        """`first_mask` has a bit for each token that an answer may begin with."""
        self._make = make
        self._first_mask = first_mask

    def may_begin_with(self, token_ids: Iterable[int]) -> bool:
        """Whether an answer may begin with one of these tokens."""
        return any(self._first_mask[token_id // 8] >> token_id % 8 & 1 for token_id in token_ids)

    def matcher(self) -> Matcher:
        """A matcher at the beginning of an answer. Takes microseconds."""
        return self._make()


class NumberTokens:
    """Bounds the digits of JSON numbers, which a model may otherwise write without end.

    A number is found by the digits at the end of the text. Digits in strings and free text are not bounded. There the
    mask allows a quote or a letter other than `e` next, which it never does inside a number.
    """

    def __init__(self, token_bytes: Sequence[bytes], row_words: int) -> None:
        import numpy as np

        def mask(token_ids: Iterable[int]) -> npt.NDArray[np.int32]:
            bits = np.zeros(row_words * 32, np.bool_)
            bits[list(token_ids)] = True
            return np.packbits(bits, bitorder="little").view(np.int32)

        def begin_with(first_bytes: bytes) -> list[int]:
            return [token_id for token_id, data in enumerate(token_bytes) if data[:1] and data[0] in first_bytes]

        self.digits = mask(begin_with(b"0123456789"))  # [row_words]
        self._text = mask(begin_with(b'"a'))
        # By the number of an exponent's digits so far: the tokens with which it would have too many.
        signed = [(token_id, token_bytes[token_id]) for token_id in begin_with(b"0123456789+-")]
        too_long = [re.compile(rb"[-+]?[0-9]{%d}" % num).match for num in range(MAX_EXPONENT_DIGITS + 1, 0, -1)]
        self._exponents = [mask(token_id for token_id, data in signed if is_so(data)) for is_so in too_long]

    def bound(self, row: npt.NDArray[np.int32], tail: bytes) -> None:
        """Remove from a mask the digits that would be too many for the number at the end of `tail`."""
        number = _LONG_NUMBER.search(tail)
        if number is None or (row & self._text).any():
            return
        others = row & ~(self.digits if number[1] is None else self._exponents[len(number[1])])
        if others.any():  # else the schema allows only digits here: a constant, a bound
            row[:] = others


class GuidedMatcher:
    """A `Matcher` by llguidance.

    A run of forced tokens is computed once, at its beginning, and kept to its end. So an answer does not depend on the
    number of tokens that a step adds.
    """

    def __init__(
        self,
        inner: llguidance.LLMatcher,
        token_bytes: Sequence[bytes],
        *,
        has_forced_tokens: bool,
        number_tokens: NumberTokens | None,
    ) -> None:
        """`number_tokens` bounds the numbers of JSON; None if the answer has none."""
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
            else:
                self._inner.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
                if self._inner.is_error():
                    row[:] = 0
                    break
                if self._number_tokens is not None:
                    self._number_tokens.bound(row, tail)
                if not row.any():
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
                rows[draw + 1 :] = -1  # the answer ends before these draws: their tokens are dropped
                break
            if not forced:
                forced.extend(self._next_forced())
        if num_taken:
            self._inner.rollback(num_taken)
        self._note_error()

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
