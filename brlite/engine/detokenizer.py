"""Turns one sequence's tokens into text, a token at a time: joins characters split over tokens, looks for stop strings.

No token is decoded twice. End-of-text tokens and token limits are left to the caller.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from brlite.tokenizer import Tokenizer


class Detokenizer:
    """The text of one sequence. What `push` and `finish` return joins to the same text however the tokens are split.

    * An incomplete character is never returned: its bytes are kept until the rest comes, and `finish` drops them.
      Invalid UTF-8 bytes become U+FFFD.
    * The stop string that is complete first ends the text; of several that end at the same character, the longest. So
      the text ends without waiting for another token. It is cut before the stop string, or after it with
      `include_stop`. Text that may be the beginning of a stop string is held back until that is decided.
    * A stop string counts only if it ends in the text of a token after the first `min_tokens`; it may begin before.
    * Special tokens are left out; without `skip_special_tokens` they give their literal text. A stop string that is a
      special token's text also ends the text if that token is left out. Spaces are kept.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        shown_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`shown_token_ids` are special tokens that are not left out."""
        self.stop_string: str | None = None
        self._token_bytes = tokenizer.token_bytes
        skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._skipped_token_ids = skipped - shown_token_ids if shown_token_ids else skipped
        self._partial = b""  # the beginning of a character
        self._held = ""  # decoded, and perhaps the beginning of a stop string
        self._stop = tuple(sorted(set(stop), key=len, reverse=True))
        self._stop_starts = frozenset(text[0] for text in self._stop)
        # Special tokens that are stop strings and are left out: their ids are compared, since their text is not shown.
        specials = {tokenizer.special_token_id(text): text for text in self._stop} if skip_special_tokens else {}
        self._stop_specials = {token_id: text for token_id, text in specials.items() if token_id is not None}
        self._include_stop = include_stop
        self._tokens_before_stop = min_tokens

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is now certain. After a stop string was found it is always empty."""
        if self.stop_string is not None:
            return ""
        text = ""
        if token_id not in self._skipped_token_ids:
            # The C function under codecs' incremental decoder; the decoder itself is Python and takes twice as long.
            data = self._partial + self._token_bytes(token_id)
            text, num_used = codecs.utf_8_decode(data, "replace", False)
            self._partial = data[num_used:]
        if not self._stop:
            return text
        may_stop = self._tokens_before_stop <= 0
        self._tokens_before_stop -= 1
        if may_stop and token_id in self._stop_specials:
            self.stop_string = self._stop_specials[token_id]
            return self.finish() + (self.stop_string if self._include_stop else "")
        if not self._held and self._stop_starts.isdisjoint(text):
            return text
        buffer = self._held + text
        end = self._find_stop(buffer, len(self._held)) if may_stop else None
        if end is None:
            end = self._hold_from(buffer)
            self._held = buffer[end:]
        else:
            self._held = ""
        return buffer[:end]

    def finish(self) -> str:
        """The text that is held back, for a sequence that ends here. Bytes of an unfinished character are dropped."""
        text, self._held, self._partial = self._held, "", b""
        return text

    def _find_stop(self, buffer: str, num_searched: int) -> int | None:
        """Where to cut for the stop string whose end comes first after `num_searched` characters; remembers it."""
        first_end = len(buffer) + 1
        for stop in self._stop:  # longest first, which decides between equal ends
            start = buffer.find(stop, max(0, num_searched - len(stop) + 1))
            if start >= 0 and start + len(stop) < first_end:
                first_end, self.stop_string = start + len(stop), stop
        if self.stop_string is None:
            return None
        return first_end if self._include_stop else first_end - len(self.stop_string)

    def _hold_from(self, buffer: str) -> int:
        """The index in `buffer` of its longest suffix that is a proper prefix of a stop string."""
        longest = len(self._stop[0])
        for start in range(max(0, len(buffer) - longest + 1), len(buffer)):
            if buffer[start] in self._stop_starts:
                ending = buffer[start:]
                if any(stop.startswith(ending) and stop != ending for stop in self._stop):
                    return start
        return len(buffer)
