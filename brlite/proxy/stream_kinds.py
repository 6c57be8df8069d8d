"""The kinds of event streams: the last event and the error event of each. Does no I/O and no framing.

After the event that completes a stream for the client's library no error may follow; any other stream ends with one.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

from brlite.dialects import anthropic_encoder, openai_answer, responses_encoder
from brlite.errors import RequestError


class StreamKind(enum.Enum):
    """Which API a stream belongs to."""

    COMPLETIONS = enum.auto()  # every choice has a finish_reason, then [DONE]
    MESSAGES = enum.auto()  # Anthropic's: message_stop, or error
    RESPONSES = enum.auto()  # response.completed, .failed or .incomplete, or error
    OTHER = enum.auto()  # ends with its framing


_KINDS = {
    b"/v1/chat/completions": StreamKind.COMPLETIONS,
    b"/v1/completions": StreamKind.COMPLETIONS,
    b"/v1/messages": StreamKind.MESSAGES,
    b"/v1/responses": StreamKind.RESPONSES,
}
# The types of the last events.
LAST_TYPES = {
    StreamKind.COMPLETIONS: frozenset[str](),
    StreamKind.MESSAGES: frozenset({"message_stop", "error"}),
    StreamKind.RESPONSES: frozenset({"response.completed", "response.failed", "response.incomplete", "error"}),
    StreamKind.OTHER: frozenset[str](),
}
ERROR_TYPES = frozenset({"response.failed", "error"})
OPENING_TYPES = frozenset({"message_start", "ping"})  # of `/v1/messages`; those of Responses have the whole response


def kind_of(path: bytes) -> StreamKind:
    """The kind of a stream that answers a request for this path. A stored response may be sent as a stream, too."""
    path = path.partition(b"?")[0]
    return _KINDS.get(path) or (StreamKind.RESPONSES if path.startswith(b"/v1/responses/") else StreamKind.OTHER)


def is_resumed(path: bytes, fields: Mapping[bytes, bytes]) -> bool:
    """Whether the client asks for the events after one that it names. The number 0 names none."""
    last = fields.get(b"last-event-id", b"").strip()
    return last.strip(b"0") != b"" or b"starting_after=" in path.partition(b"?")[2]


def error_event(kind: StreamKind, error: RequestError, sequence_number: int) -> bytes:
    """The event that ends a failed stream, in the form that the libraries of its API expect."""
    if kind is StreamKind.MESSAGES:
        return anthropic_encoder.encode_error(error)
    if kind is StreamKind.RESPONSES:
        return responses_encoder.encode_error(error, sequence_number)
    return openai_answer.encode_error(error)
