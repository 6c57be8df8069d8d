"""Checks regular expressions before they are compiled: their size and features. Rewrites some well-known ones.

llguidance matches by derivatives, so it has no look-around, no backreferences and no word boundaries. The patterns with
look-ahead that pydantic and zod write are replaced by patterns without it, which match a subset of the same texts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MAX_GROUP_DEPTH = 100
_MAX_SIZE = 10**12  # larger sizes are counted as this
_REPETITION = re.compile(r"\{(\d{1,12})(?:,(\d{0,12}))?\}")
_OUTSIDE = re.compile(r"\\.|\[\^?\]?|.", re.DOTALL)  # of a class, which may begin with its own bracket
_IN_CLASS = re.compile(r"\\.|.", re.DOTALL)
_BRACED_ESCAPE = re.compile(r"\{[^}]*\}?")  # the compiler reports one that is never closed

_EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
_EMAIL_WITHOUT_LOOK_AHEAD = (
    r"^([A-Za-z0-9_'+\-]{1,64}\.){0,8}[A-Za-z0-9_'+\-]{0,63}[A-Za-z0-9_+-]"
    r"@([A-Za-z0-9][A-Za-z0-9\-]{0,62}\.){1,8}[A-Za-z]{2,24}$"
)
# pydantic's Decimal: without limits, with decimal_places, with max_digits and decimal_places, with max_digits.
_DECIMAL_START = re.escape(r"^(?!^[-+.]*$)[+-]?0*")
_DECIMALS = (
    re.compile(_DECIMAL_START + re.escape(r"\d*\.?\d*$")),
    re.compile(_DECIMAL_START + re.escape(r"\d*\.?\d{0,") + r"(?P<places>\d{1,4})" + re.escape(r"}0*$")),
    re.compile(
        _DECIMAL_START
        + re.escape(r"(?:\d{0,")
        + r"(?P<whole>\d{1,4})"
        + re.escape(r"}|(?=[\d.]{1,")
        + r"\d{1,4}"
        + re.escape(r"}0*$)\d{0,")
        + r"\d{1,4}"
        + re.escape(r"}\.\d{0,")
        + r"(?P<places>\d{1,4})"
        + re.escape(r"}0*$)")
    ),
    re.compile(
        _DECIMAL_START
        + re.escape(r"(?:\d{0,")
        + r"(?P<digits>\d{1,4})"
        + re.escape(r"}|(?=[\d.]{1,")
        + r"\d{1,4}"
        + re.escape(r"}0*$)\d*\.\d*0*$)")
    ),
)
_MAX_DECIMAL_DIGITS = 20

# The library's formats allow the year 0, 29 February in any year and a second of 60, which Python's parsers refuse.
_LEAP = "(0[48]|[2468][048]|[13579][26])"
_DATE = (
    rf"^(\d*[1-9]\d*-((0[13-9]|1[0-2])-|02-([01]\d|2[0-8]))|(\d\d{_LEAP}|{_LEAP}00)-02-29)"  # of a text in the format
)
_TIME = r":[0-5]\d:[0-5]\d"
FORMAT_PATTERNS = {"date": _DATE, "time": _TIME, "date-time": f"{_DATE}.*{_TIME}"}
# The texts of a format, as the library and `FORMAT_PATTERNS` allow them together.
WHOLE_FORMATS = {
    "uuid": "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$",
    "date": "^(([0-9]{3}[1-9]|[0-9]{2}[1-9][0-9]|[0-9][1-9][0-9]{2}|[1-9][0-9]{3})-"
    "((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))"
    f"|([0-9]{{2}}{_LEAP}|{_LEAP}00)-02-29)$",
}


class PatternRefused(ValueError):
    """A regular expression that cannot be enforced or costs too much. The message says why."""


def rewritten(pattern: str) -> str:
    """A known pattern with look-ahead, rewritten without it; any other pattern unchanged."""
    if pattern == _EMAIL:
        return _EMAIL_WITHOUT_LOOK_AHEAD
    for known in _DECIMALS:
        found = known.fullmatch(pattern)
        if not found:
            continue
        limits, most = {name: int(digits) for name, digits in found.groupdict().items()}, _MAX_DECIMAL_DIGITS
        if "digits" in limits:
            digits = max(1, min(limits["digits"], 2 * most))
            splits = "|".join(rf"\d{{{whole}}}\.\d{{1,{digits - whole}}}" for whole in range(1, digits))
            return rf"^[+-]?(\d{{1,{digits}}}{'|' if splits else ''}{splits})$"
        whole, places = min(limits.get("whole", most), most), min(limits.get("places", most), most)
        fraction = rf"\.\d{{1,{places}}}" if places else ""
        before = rf"\d{{1,{whole}}}" if whole else "0"
        return rf"^[+-]?{before}({fraction})?$" if fraction else rf"^[+-]?{before}$"
    return pattern


def with_plain_classes(pattern: str) -> str:
    """A schema's pattern with escapes where the library reads the characters of a class as operators.

    ECMA 262 has no classes in classes (`[[:alpha:]]`), and no `&&`, `--` and `~~` in them.
    """
    written, position, is_class = list[str](), 0, False
    while position < len(pattern):
        found = (_IN_CLASS if is_class else _OUTSIDE).match(pattern, position)
        assert found is not None  # both match any character
        part, position = found[0], found.end()
        if is_class and part == "-" and pattern.startswith("-", position) and written[-1] in ("[", "[^"):
            part = r"\-"  # the first of a range, as in [--a]
        elif is_class and (part in "[&~" or (part == "-" and written[-1] == "-")):
            part = f"\\{part}"
        is_class = part != "]" if is_class else part[0] == "["
        written.append(part)
    return "".join(written)


def name_pattern(schema: Mapping[str, Any]) -> str | None:
    """A pattern of the strings that match a schema: "" if all do, None if no pattern is known to be exact."""
    if schema.get("type", "string") != "string":
        return None
    said = {keyword: value for keyword, value in schema.items() if keyword != "type"}
    if said.keys() <= {"minLength", "maxLength"}:
        least, most = said.get("minLength", 0), said.get("maxLength", "")
        is_whole = all(type(value) is int for value in said.values())
        if not is_whole or least < 0 or (most != "" and most < least):
            return None
        return rf"^[\s\S]{{{least},{most}}}$" if least or most != "" else ""
    if said.keys() == {"format"}:
        return WHOLE_FORMATS.get(said["format"])
    return said["pattern"] if said.keys() == {"pattern"} and isinstance(said["pattern"], str) else None


def pattern_size(pattern: str) -> int:
    """The length of the pattern in single characters, with its counted repetitions written out.

    Raises `PatternRefused` for look-around, backreferences, word boundaries and groups nested too deep. Other errors
    are left to the compiler.
    """
    sums, atom, position = [0], 0, 0  # `sums`: the size of each open group so far, without its last atom
    while position < len(pattern):
        character = pattern[position]
        repetition = _REPETITION.match(pattern, position) if character == "{" else None
        if character == "(":
            position = _skip_group_head(pattern, position)
            sums[-1] += atom
            sums.append(0)
            atom = 0
            if len(sums) > MAX_GROUP_DEPTH:
                raise PatternRefused(f"has groups nested more than {MAX_GROUP_DEPTH} deep")
            continue
        if character == ")" and len(sums) > 1:
            atom = min(sums.pop() + atom, _MAX_SIZE)
        elif repetition is not None:
            atom *= max(1, int(repetition[2] or repetition[1]))
            position = repetition.end()
            continue
        elif character not in "*+?|":
            sums[-1] += atom
            atom = 1
            if character == "\\":
                position = _skip_escape(pattern, position)
                continue
            if character == "[":
                position = _skip_class(pattern, position)
                continue
        position += 1
    return min(sum(sums) + atom, _MAX_SIZE)


def _skip_group_head(pattern: str, position: int) -> int:
    head = pattern[position : position + 4]
    if head.startswith(("(?=", "(?!", "(?<=", "(?<!")):
        raise PatternRefused(f"uses look-around at character {position}, which cannot be enforced")
    if head.startswith("(?P="):
        raise PatternRefused(f"uses a backreference at character {position}, which cannot be enforced")
    if head.startswith(("(?<", "(?P<")):
        return pattern.find(">", position) + 1 or len(pattern)
    return position + (2 if head.startswith("(?") else 1)


def _skip_escape(pattern: str, position: int) -> int:
    escaped = pattern[position + 1 : position + 2]
    if escaped in ("b", "B"):
        raise PatternRefused(f"uses a word boundary at character {position}, which cannot be enforced")
    if (escaped.isdigit() and escaped != "0") or escaped == "k":
        raise PatternRefused(f"uses a backreference at character {position}, which cannot be enforced")
    braces = _BRACED_ESCAPE.match(pattern, position + 2) if escaped and escaped in "pPxu" else None
    return braces.end() if braces else position + 2


def _skip_class(pattern: str, position: int) -> int:
    """The position after `[...]`. The compiler reports a bracket that is never closed."""
    position += 2 if pattern.startswith("[^", position) else 1
    depth = 1
    while position < len(pattern) and depth:
        if pattern[position] == "\\":
            position += 1
        elif pattern[position] == "[":
            depth += 1  # Rust nests classes: [[:alpha:]]; in JavaScript the bracket is a character
        elif pattern[position] == "]":
            depth -= 1
        position += 1
    return position
