"""Prometheus's text format, version 0.0.4: families of samples, read, labelled, joined and written again.

Values and timestamps are kept as text. Its input comes from upstreams, so it is strict: one malformed line rejects the
whole text. Does no I/O and uses nothing of upstreams.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple, cast, get_args

Kind = Literal["counter", "gauge", "histogram", "summary", "untyped"]

# The suffixes that the names of samples add to their family's name.
SUFFIXES: dict[Kind, tuple[str, ...]] = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("", "_sum", "_count")}
MAX_SHOWN = 100

_COMMENT = re.compile(r"#[ \t]*(HELP|TYPE)[ \t]+([a-zA-Z_:][a-zA-Z0-9_:]*)(?:[ \t]+(.*))?")
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABELS_BEGIN = re.compile(r"[ \t]*\{")
_LABEL = re.compile(r'[ \t]*([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*("(?:[^"\\]|\\.)*")[ \t]*(,?)')
_LABELS_END = re.compile(r"[ \t]*\}")
_VALUE = re.compile(r"[ \t]*([-+.0-9A-Za-z]+)([ \t]+-?[0-9]+)?")
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


class BadExposition(Exception):
    """A text is malformed; the message names the line."""


class Label(NamedTuple):
    """One label of a sample, its value quoted as in the text."""

    name: str
    quoted: str

    @classmethod
    def of(cls, name: str, value: str) -> Label:
        return cls(name, f'"{value.translate(_ESCAPES)}"')


class MetricFamily:
    """The samples under one name, each a line."""

    __slots__ = ("about", "kind", "name", "samples")

    def __init__(
        self, name: str, kind: Kind = "untyped", about: str | None = None, samples: Iterable[str] = ()
    ) -> None:
        self.name = name
        self.kind = kind
        self.about = about
        self.samples = list(samples)


Families = dict[str, MetricFamily]


def read_exposition(text: str, label: Label | None = None) -> Families:
    """The families of a text by name; `label` is added to each sample. Raises `BadExposition`.

    A sample's own label of that name is renamed to `exported_…`, as Prometheus does it.
    """
    reader = _Reader(label)
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: a value may have other line ends
        try:
            reader.read(line.strip(" \t\r"))
        except ValueError:
            raise BadExposition(f"line {number} is not a sample: {line[:MAX_SHOWN]}") from None
    return reader.families


def join(families: Families, more: Mapping[str, MetricFamily]) -> list[str]:
    """Add the samples of `more`, which is not changed. Returns the names left out because their types differ."""
    left_out = []
    for name, family in more.items():
        known = families.setdefault(name, MetricFamily(name, family.kind, family.about))
        if known.kind == family.kind:
            known.samples += family.samples
        else:
            left_out.append(name)
    return left_out


def write(families: Families, comments: Iterable[str] = ()) -> str:
    """The text of the families, after one line for each comment."""
    lines = [f"# {comment}" for comment in comments]
    for family in families.values():
        if family.about is not None:
            lines.append(f"# HELP {family.name} {family.about}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        lines += family.samples
    return "\n".join([*lines, ""])


def sample(name: str, labels: Iterable[Label], value: str) -> str:
    """The line of a sample; `value` may include a timestamp."""
    text = ",".join(f"{label.name}={label.quoted}" for label in labels)
    return f"{name}{{{text}}} {value}"


class _Reader:
    """Reads line by line. `_homes` maps the names of samples to their families."""

    def __init__(self, label: Label | None) -> None:
        self._label = label
        self._homes: dict[str, MetricFamily] = {}
        self.families: Families = {}

    def read(self, line: str) -> None:
        """Add one line, a comment or a sample. Raises `ValueError` if it is malformed."""
        if comment := _COMMENT.fullmatch(line):
            word, name, text = comment.groups("")
            family = self._family(name)
            if word == "HELP":
                family.about = text
                return
            family.kind = cast(Kind, text) if text in get_args(Kind) else "untyped"
            self._homes.update(dict.fromkeys((name + suffix for suffix in SUFFIXES.get(family.kind, ("",))), family))
        elif line and not line.startswith("#"):
            name, labels, value = _parts(line)
            home = self._homes.get(name) or self._family(name)
            home.samples.append(line if self._label is None else sample(name, _with_label(labels, self._label), value))

    def _family(self, name: str) -> MetricFamily:
        family = self.families.get(name)
        if family is None:
            family = self.families[name] = self._homes[name] = MetricFamily(name)
        return family


def _with_label(labels: list[Label], added: Label) -> list[Label]:
    """The labels and `added`. A label of the same name is renamed to `exported_…`."""
    names, free_name = {label.name for label in labels}, added.name
    while free_name in names:
        free_name = f"exported_{free_name}"
    return [*(label._replace(name=free_name) if label.name == added.name else label for label in labels), added]


def _parts(line: str) -> tuple[str, list[Label], str]:
    """A sample's name, its labels, and its value with the timestamp, if it has one. Raises `ValueError`."""
    name = _found(_NAME.match(line))
    position = name.end()
    labels = []
    if begin := _LABELS_BEGIN.match(line, position):
        position = begin.end()
        while label := _LABEL.match(line, position):
            labels.append(Label(label[1], label[2]))
            position = label.end()
            if not label[3]:
                break
        position = _found(_LABELS_END.match(line, position)).end()
    elif line[position : position + 1] not in (" ", "\t"):
        raise ValueError
    value = _found(_VALUE.fullmatch(line, position))
    float(value[1])
    if len({label.name for label in labels}) < len(labels):
        raise ValueError
    return name[0], labels, value[1] + (value[2] or "")


def _found(match: re.Match[str] | None) -> re.Match[str]:
    if match is None:
        raise ValueError
    return match
