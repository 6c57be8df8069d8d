"""Quotes text from a file or a library in a message: on one line, cut, with control characters escaped.

The cost is bounded for any value: what would be cut is not formatted first. A pickle of 400 bytes can hold a tuple
whose `repr` is endless.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import islice

JOINERS = "\u200c\u200d"  # needed by some scripts and emoji, and harmless
_NOT_PLAIN = re.compile(f"[^ -~\n\t{JOINERS}]")  # the category of others decides
CONTROL = ("Cc", "Cf", "Zl", "Zp")  # Unicode categories
MAX_EXCERPT = 80
MAX_REASON = 300
MAX_ITEMS = 4
MAX_DEPTH = 2
MAX_SHOWN_BITS = 256  # an integer of more bits is described by its size
BITS_PER_DIGIT = 3.3219


def excerpt(value: object) -> str:
    """A value from a file, as Python writes it, in at most 80 characters."""
    return _cut(_repr(value, MAX_DEPTH), MAX_EXCERPT)


def one_line(text: object, limit: int = MAX_REASON) -> str:
    """A text without quotes: white space becomes single spaces, unprintable characters are escaped."""
    words = " ".join(str(text)[: 4 * limit].split())
    return _cut("".join(letter if letter.isprintable() else _escaped(letter) for letter in words), limit)


def reason(error: BaseException) -> str:
    """The message of a library's exception, in at most 300 characters. Of an `OSError` without its number and path."""
    system_text = error.strerror if isinstance(error, OSError) else None
    return one_line(system_text or error) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; of one without a message, its class."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def shown(text: str) -> str:
    """Text for a terminal: control characters, which could move the cursor or run a command, are escaped.

    Line feeds and tabs stay.
    """
    return _NOT_PLAIN.sub(
        lambda found: _escaped(found[0]) if unicodedata.category(found[0]) in CONTROL else found[0], text
    )


def _repr(value: object, depth: int) -> str:
    if isinstance(value, str):
        return repr(str.__getitem__(value, slice(MAX_EXCERPT)))
    if isinstance(value, bytes):
        return repr(value[:MAX_EXCERPT])
    if isinstance(value, int) and value.bit_length() > MAX_SHOWN_BITS:
        return f"a number of {int(value.bit_length() / BITS_PER_DIGIT) + 1} digits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if not isinstance(value, list | tuple | dict):
        return type(value).__name__
    left, right = "()" if isinstance(value, tuple) else "{}" if isinstance(value, dict) else "[]"
    if depth == 0:
        return f"{left}…{right}" if value else left + right
    if isinstance(value, dict):
        pairs = islice(value.items(), MAX_ITEMS)
        items = [f"{_repr(key, 0)}: {_repr(item, depth - 1)}" for key, item in pairs]
    else:
        items = [_repr(item, depth - 1) for item in value[:MAX_ITEMS]]
    more = [f"… {len(value)} in all"] if len(value) > MAX_ITEMS else []
    return left + ", ".join([*items, *more]) + right


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape", "backslashreplace").decode("ascii")


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
