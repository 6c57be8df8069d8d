"""What a dialect is: two pure functions and the shape of its errors.

A new one is a file with a `DIALECT`, its place in `DIALECTS` (`__init__.py`) and its test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from brlite.config.options import LimitsConfig
from brlite.dialects.event import Event, TokenUsage
from brlite.dialects.generation import Generation


class ResponseEncoder(Protocol):
    """Turns the events of one call into its response's bytes: those of a stream, or one whole body."""

    def opening(self, usage: TokenUsage) -> bytes:
        """What a stream begins with. `usage` has the prompts' tokens."""
        ...

    def encode(self, event: Event) -> bytes:
        """What a stream says of one event."""
        ...

    def closing(self, usage: TokenUsage) -> bytes:
        """What a stream ends with."""
        ...

    def failing(self, error: BaseException) -> bytes:
        """What a stream ends with where something went wrong."""
        ...

    def whole(self, events: Sequence[Event], usage: TokenUsage, warnings: Sequence[str]) -> bytes:
        """The body of a response that is not streamed; one event a choice, unless the call `keeps_order`."""
        ...


class Dialect(NamedTuple):
    """One API for generating text.

    `id_prefix` is what the ids of its answers begin with. `decode` raises `InvalidRequest`. `make_encoder` takes the
    call, the answer's id, the model's name as the client has it and the backend's fingerprint (empty if it has none).
    `encode_error` is what a stream ends with where something went wrong before it has an encoder.
    """

    path: str
    id_prefix: str
    decode: Callable[[bytes, LimitsConfig], Generation]
    make_encoder: Callable[[Generation, str, str, str], ResponseEncoder]
    encode_error: Callable[[BaseException], bytes]
