"""Turns one answer's tokens into text, a token at a time: joins characters split over tokens, and finds its end.

No token is decoded twice. The end that a grammar decides is left to the caller.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from brlite.sampling_params import FinishReason

if TYPE_CHECKING:
    from brlite.tokenizer import Tokenizer

NO_ENDS: Mapping[int, int | None] = MappingProxyType({})


class Detokenizer:
    """The text of one answer. What `push` and `finish` return joins to the same text however the tokens are split.

    At the end of the text `finish_reason` is "stop" or "length", and `stop_reason` is the stop string or token id that
    ended it, if one did.

    * An incomplete character is never returned: its bytes are kept until the rest comes, and `finish` drops them.
      Invalid UTF-8 bytes become U+FFFD.
    * The stop string that is complete first ends the text; of several that end at the same character, the longest. So
      the text ends without waiting for another token. It is cut before the stop string, or after it with
      `include_stop`. Text that may be the beginning of a stop string is held back until that is decided.
    * A stop string counts only if it ends in the text of a token after the first `min_tokens`; it may begin before.
    * A token of `ends` ends the text. It adds no text itself, unless it has a stop reason and `include_stop` is set.
    * Special tokens are left out; without `skip_special_tokens` they give their literal text. A stop string that is a
      special token's text also ends the text if that token is left out. Spaces are kept.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...] = (),
        *,
        ends: Mapping[int, int | None] = NO_ENDS,
        max_tokens: int = sys.maxsize,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
        shown_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`ends` maps each token that ends the text to its stop reason. `shown_token_ids` are special tokens that are
        not left out.
        """
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self._token_bytes, self._whole_text = tokenizer.token_bytes, tokenizer.whole_text
        self._ends = ends
        self._num_left = max_tokens
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
        """Add a token and return the text that is now certain. After the end of the text it is always empty."""
        if self.finish_reason is not None:
            return ""
        if token_id in self._ends:
            stop_reason = self._ends[token_id]
            text = "" if stop_reason is None or not self._include_stop else self._read(token_id)
            self.finish_reason, self.stop_reason = "stop", stop_reason
            return text + self.finish()
        is_special = self._stop or self._partial or token_id in self._skipped_token_ids
        shown = None if is_special else self._whole_text(token_id)  # as in `_read`, without its call
        text = self._read(token_id) if shown is None else shown
        self._num_left -= 1
        if self._num_left or self.finish_reason is not None:
            return text
        self.finish_reason = "length"
        return text + self.finish()

    def _read(self, token_id: int) -> str:
        """The text that a token adds, up to a stop string."""
        if token_id in self._skipped_token_ids:
            text: str | None = ""
        else:
            text = None if self._partial else self._whole_text(token_id)
        if text is None:
            # The C function under codecs' incremental decoder; the decoder itself is Python and takes twice as long.
            data = self._partial + self._token_bytes(token_id)
            text, num_used = codecs.utf_8_decode(data, "replace", False)
            self._partial = data[num_used:]
        if not self._stop:
            return text
        may_stop = self._tokens_before_stop <= 0
        self._tokens_before_stop -= 1
        if may_stop and token_id in self._stop_specials:
            found = self._stop_specials[token_id]
            self.finish_reason, self.stop_reason = "stop", found
            return self.finish() + (found if self._include_stop else "")
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
        """The text that is held back, for an answer that ends here. Bytes of an unfinished character are dropped."""
        text, self._held, self._partial = self._held, "", b""
        return text

    def _find_stop(self, buffer: str, num_searched: int) -> int | None:
        """Where to cut for the stop string whose end comes first after `num_searched` characters; it ends the text."""
        first_end, found = len(buffer) + 1, ""
        for stop in self._stop:  # longest first, which decides between equal ends
            start = buffer.find(stop, max(0, num_searched - len(stop) + 1))
            if start >= 0 and start + len(stop) < first_end:
                first_end, found = start + len(stop), stop
        if not found:
            return None
        self.finish_reason, self.stop_reason = "stop", found
        return first_end if self._include_stop else first_end - len(found)

    def _hold_from(self, buffer: str) -> int:
        """The index in `buffer` of its longest suffix that is a proper prefix of a stop string."""
        longest = len(self._stop[0])
        for start in range(max(0, len(buffer) - longest + 1), len(buffer)):
            if buffer[start] in self._stop_starts:
                ending = buffer[start:]
                if any(stop.startswith(ending) and stop != ending for stop in self._stop):
                    return start
        return len(buffer)
