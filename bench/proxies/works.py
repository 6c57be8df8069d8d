"""The works that proxies are put to: streams, short requests, one at a time, and large bodies. Sends nothing.

`large` is all ASCII. `large-utf8` is the same text with its quotation marks and dashes: who looks for a `model` in that
takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec
from measuring import prompts
from msgspec import Struct
from proxies.launchers import MODEL

STREAMS, SHORT, SINGLE, LARGE, LARGE_UTF8 = NAMES = ("streams", "short", "single", "large", "large-utf8")
NUM_LARGE_MESSAGES, LARGE_MESSAGE = 100, 1020  # 107 KB
SHORT_PROMPT = 128
SPARE_SECONDS = 1.0  # streams last for so much longer than warm-up and window
NO_PACE_SECONDS = 0.00001


class Work(Struct, frozen=True, kw_only=True):
    """What every connection asks for, again and again. With `events` each answer is a stream of so many."""

    name: str
    body: bytes
    events: int
    connections: int
    warm_up_seconds: float
    seconds: float


class Scale(Struct, frozen=True):
    """How long each load is, and how many streams there are with one event every `pace_ms`."""

    warm_up_seconds: float
    seconds: float
    streams: int
    pace_ms: int


def make_works(scale: Scale) -> list[Work]:
    """One of each name. Streams have twice the time, since they get few events in it."""
    return [
        _streams(scale),
        _requests(SHORT, small_body(), 64, scale),
        _requests(SINGLE, small_body(), 1, scale),
        _requests(LARGE, _large_body(_text().encode("ascii", "ignore").decode()), 16, scale),
        _requests(LARGE_UTF8, _large_body(_text()), 16, scale),
    ]


def small_body() -> bytes:
    return _body(_messages(), max_tokens=16)


def _streams(scale: Scale) -> Work:
    """All begin together and last until the window is over, so that it has nothing but events in it."""
    seconds = 2 * scale.warm_up_seconds + 2 * scale.seconds + SPARE_SECONDS
    events = math.ceil(seconds / (scale.pace_ms / 1000 or NO_PACE_SECONDS))
    return Work(
        name=STREAMS,
        body=_body(_messages(), stream=True, max_tokens=events),
        events=events,
        connections=scale.streams,
        warm_up_seconds=2 * scale.warm_up_seconds,
        seconds=2 * scale.seconds,
    )


def _requests(name: str, body: bytes, connections: int, scale: Scale) -> Work:
    return Work(
        name=name,
        body=body,
        events=0,
        connections=connections,
        warm_up_seconds=scale.warm_up_seconds,
        seconds=scale.seconds,
    )


def _messages() -> list[dict[str, str]]:
    return [{"role": "user", "content": prompts.read_prompts(prompts.PROMPTS)[0][:SHORT_PROMPT]}]


def _text() -> str:
    return prompts.QUALITY_TEXT.read_text(encoding="utf-8")


def _large_body(text: str) -> bytes:
    """A long chat, each message cut from another place of the text."""
    step = (len(text) - LARGE_MESSAGE) // NUM_LARGE_MESSAGES
    contents = [text[i * step : i * step + LARGE_MESSAGE] for i in range(NUM_LARGE_MESSAGES)]
    return _body(
        [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)],
        max_tokens=16,
    )


def _body(messages: Sequence[Mapping[str, str]], **fields: object) -> bytes:
    return msgspec.json.encode({"model": MODEL, "messages": messages, "temperature": 0.7, **fields})
