"""The tokens that a forwarded request used: as its response reports if that is possible, else estimated from bytes.

An estimate of the prompt is charged as soon as the request is sent, and is corrected when the exchange ends. Usage is
read in every dialect that is forwarded: chats and completions, `/v1/messages`, `/v1/responses`, embeddings, rerank.
A reported number is used only if it is possible for the request, since it is charged to the key's budget.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from typing import Annotated, NamedTuple

import msgspec

from brlite.dialects.json_body import DECODE_ERRORS

BYTES_PER_TOKEN = 4  # of JSON and English text; other scripts have fewer
BYTES_PER_ENCODED_TOKEN = 256  # of base64: pictures cost tokens by their size in pixels, not in bytes
# Tokens that a request can use besides those of its body and its response: a template, pictures by URL, a conversation
# that the server keeps, hidden reasoning.
UNSEEN_TOKENS = 65_536
TAIL_BYTES = 4096  # the end of a long response, which contains its usage

# The response is generated text, with a token for every few bytes.
GENERATING_PATHS = (b"/v1/chat/completions", b"/v1/completions", b"/v1/responses", b"/v1/messages", b"/infill")
# Requests for which no model computes.
FREE_PATHS = frozenset(
    b"/tokenize /detokenize /apply-template /explain /v1/messages/count_tokens /v1/responses/input_tokens "
    b"/v1/chat/completions/render /v1/completions/render".split()
)

RUN_BYTES = 4096  # from here on a run of base64's letters is base64
_LETTERS = (string.ascii_letters + string.digits + "+/").encode()
_REST = re.compile(rb"[A-Za-z0-9+/]*={0,2}")
_USAGE_FIELD = re.compile(rb'(?<!\\)"usage"[ \t\r\n]*:[ \t\r\n]*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')

_Count = Annotated[int, msgspec.Meta(ge=0)]


class ForwardedUsage(NamedTuple):
    """Tokens of a prompt and of what was generated for it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


NO_USAGE = ForwardedUsage()


class _Counts(msgspec.Struct):
    """`usage` in all dialects. Anthropic's `input_tokens` excludes cached tokens, which have two other fields."""

    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    input_tokens: _Count | None = None
    output_tokens: _Count | None = None
    total_tokens: _Count | None = None
    cache_creation_input_tokens: _Count | None = None
    cache_read_input_tokens: _Count | None = None

    def usage(self) -> ForwardedUsage:
        completion = self.completion_tokens or self.output_tokens or 0
        prompt = self.prompt_tokens
        if prompt is None and self.input_tokens is not None:
            cached = (self.cache_creation_input_tokens or 0) + (self.cache_read_input_tokens or 0)
            prompt = self.input_tokens + cached
        if prompt is None:
            prompt = max(0, (self.total_tokens or 0) - completion)
        return ForwardedUsage(prompt, completion)


class _Within(msgspec.Struct):
    usage: _Counts | None = None


class _ResponseUsage(msgspec.Struct):
    """A response or an event: `message` is of Anthropic's `message_start`, `response` of `response.completed`."""

    usage: _Counts | None = None
    message: _Within | None = None
    response: _Within | None = None


_ANSWER = msgspec.json.Decoder(_ResponseUsage)


class Seen(msgspec.Struct, frozen=True, gc=False):
    """What was read of a response: JSON texts that may contain its usage, the events, and the bytes of their text.

    `is_refusal`: a stream that has an error and no text.
    """

    parts: tuple[bytes, ...] = ()
    num_events: int = 0
    num_text_bytes: int = 0
    is_refusal: bool = False


def estimate_prompt(path: bytes, body: bytes) -> int:
    """An estimate of the tokens of a request's prompt, at least one; 0 for a path that computes no tokens."""
    if path.partition(b"?")[0] in FREE_PATHS:
        return 0
    num_encoded = num_encoded_bytes(body)
    return -(-(len(body) - num_encoded) // BYTES_PER_TOKEN) + num_encoded // BYTES_PER_ENCODED_TOKEN


def num_encoded_bytes(body: bytes) -> int:
    """The bytes of base64 in a body: of all its runs of at least `RUN_BYTES` letters.

    Each such run behind the first byte, which is a brace, has a letter at a multiple of `RUN_BYTES`. Only there is
    looked: that takes 0.6 ms for 1 MB, an expression for the run 20 to 45 ms.
    """
    num_bytes = end = 0
    for place in range(RUN_BYTES, len(body), RUN_BYTES):
        if place < end:
            continue  # within the last run
        before = body[max(end, place - RUN_BYTES) : place]
        begin = place - len(before) + len(before.rstrip(_LETTERS))
        rest = _REST.match(body, place)
        assert rest is not None  # it matches the empty string, too
        if len(body[begin : rest.end()].rstrip(b"=")) >= RUN_BYTES:
            num_bytes += rest.end() - begin
            end = rest.end()
    return num_bytes


def estimate_completion(path: bytes, seen: Seen) -> int:
    """An estimate of the generated tokens, at least one for each event."""
    if path.partition(b"?")[0] not in GENERATING_PATHS:
        return 0
    return max(seen.num_events, -(-seen.num_text_bytes // BYTES_PER_TOKEN))


def reported_usage(parts: Iterable[bytes]) -> ForwardedUsage | None:
    """The usage that the parts of a response report: the largest of each number. None if no part reports any."""
    found = []
    for part in parts:
        try:
            answer = _ANSWER.decode(part)
        except DECODE_ERRORS:
            continue
        within = (answer.message, answer.response)
        counts = [answer.usage, *(each.usage for each in within if each is not None)]
        found += [each.usage() for each in counts if each is not None]
    return ForwardedUsage(*map(max, zip(*found, strict=True))) if found else None


def is_possible(usage: ForwardedUsage, num_body_bytes: int, num_text_bytes: int) -> bool:
    """Whether a request of so many bytes, with a response text of so many bytes, can have used so many tokens.

    A token has at least one byte.
    """
    return (
        usage.prompt_tokens <= num_body_bytes + UNSEEN_TOKENS
        and usage.completion_tokens <= num_text_bytes + UNSEEN_TOKENS
    )


def usage_in_tail(tail: bytes) -> tuple[bytes, ...]:
    """The usage in the last bytes of a long response, as one JSON object; empty if there is none."""
    found = _USAGE_FIELD.findall(tail)
    return (b'{"usage":%b}' % found[-1],) if found else ()
