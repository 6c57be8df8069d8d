"""The interface of a dialect: two pure functions and the shape of its errors.

To add a dialect, add a file with a `DIALECT`, an entry in `DIALECTS` (`__init__.py`) and a test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from brlite.config.options import LimitsConfig
from brlite.dialects.event import Event, TokenUsage
from brlite.dialects.generation import Generation


class ResponseEncoder(Protocol):
    """Encodes the events of one call as its response: a stream, or one whole body."""

    def opening(self, usage: TokenUsage) -> bytes:
        """The bytes that begin a stream, if any. `usage` counts the tokens of the prompts."""
        return b""

    def encode(self, event: Event) -> bytes:
        """The bytes of one event in a stream."""
        ...

    def encode_text(self, text: str) -> bytes:
        """As `encode`, for an event of choice 0 that has only this text. Most events are such."""
        return self.encode(Event(choice=0, text=text))

    def closing(self, usage: TokenUsage) -> bytes:
        """The bytes that end a stream, if any."""
        return b""

    def failing(self, error: BaseException) -> bytes:
        """The bytes that end a stream after an error."""
        ...

    def whole(self, events: Sequence[Event], usage: TokenUsage, warnings: Sequence[str]) -> bytes:
        """The body of a response that is not streamed. There is one event per choice, unless the call `keeps_order`."""
        ...


class Dialect(NamedTuple):
    """One API for generating text.

    The ids of its answers begin with `id_prefix`. `decode` raises `InvalidRequest`. `make_encoder` takes the call, the
    answer's id, the model name that the client sees and the backend's fingerprint (empty if it has none).
    `encode_error` gives the bytes that end a stream after an error, if it has no encoder yet.
    """

    path: str
    id_prefix: str
    decode: Callable[[bytes, LimitsConfig], Generation]
    make_encoder: Callable[[Generation, str, str, str], ResponseEncoder]
    encode_error: Callable[[BaseException], bytes]
