"""A digest of the beginning of a prompt. `choice = "prefix"` uses it to choose an upstream.

Everything before the first user message counts, of any length, since a prefix cache holds it: a system prompt,
instructions, tools, up to `MAX_MESSAGES` earlier messages, each with up to `MAX_PARTS` parts. Reads bodies of chats,
completions, `/v1/messages` and `/v1/responses`. Uses nothing of models and upstreams.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import msgspec

from brlite.dialects.json_body import DECODE_ERRORS
from brlite.files.text_file import BYTE_ORDER_MARK

DIGEST_BYTES = 16
MAX_MESSAGES = 1000  # a message takes 3 µs of the event loop; 1 MB of empty ones would take a second
MAX_PARTS = 1000  # 333,000 empty ones would take 70 ms beside their decoding
_NULL = msgspec.Raw(b"null")


class _Prompt(msgspec.Struct):
    """The fields that may begin a prompt; None and null: absent."""

    tools: msgspec.Raw = _NULL
    system: Any = None
    instructions: Any = None
    messages: list[msgspec.Raw] | None = None
    input: msgspec.Raw = _NULL
    prompt: msgspec.Raw = _NULL


class _Message(msgspec.Struct):
    role: Any = None
    content: Any = None


_PROMPT = msgspec.json.Decoder(_Prompt)
_MESSAGE = msgspec.json.Decoder(_Message)
_MESSAGES = msgspec.json.Decoder(list[msgspec.Raw])


def prompt_start(body: bytes, num_bytes: int) -> bytes:
    """A digest of the beginning of the body's prompt; b"" if it has none, or is malformed.

    Of the first user message, and of a completion's (first) prompt, only the first `num_bytes` count.
    """
    digest = blake2b(digest_size=DIGEST_BYTES)
    is_empty = True
    try:
        for part in _parts(_PROMPT.decode(body.removeprefix(BYTE_ORDER_MARK)), num_bytes):
            # The lengths make the input unambiguous: different parts never give the same bytes.
            digest.update(b"%d:" % len(part))
            digest.update(part)
            is_empty = False
    except (*DECODE_ERRORS, UnicodeEncodeError):
        return b""
    return b"" if is_empty else digest.digest()


def _parts(prompt: _Prompt, num_bytes: int) -> Iterator[bytes]:
    if prompt.tools != _NULL:
        yield bytes(prompt.tools)
    for text in (_text(prompt.system), _text(prompt.instructions)):
        if text:
            yield text.encode()
    messages = prompt.messages
    if not messages and prompt.input != _NULL and bytes(prompt.input).startswith(b"["):
        messages = _MESSAGES.decode(prompt.input)
        if messages and not bytes(messages[0]).startswith(b"{"):  # texts or tokens, as in `/v1/embeddings`
            messages = None
    for raw in (messages or ())[:MAX_MESSAGES]:
        message = _MESSAGE.decode(raw)
        text = _text(message.content)
        yield str(message.role).encode()
        if message.role == "user":
            yield text.encode()[:num_bytes]
            return
        yield text.encode()
    if messages:
        return
    start = msgspec.json.decode(prompt.prompt if prompt.prompt != _NULL else prompt.input)
    if isinstance(start, list) and start and isinstance(start[0], (str, list)):
        start = start[0]  # several prompts
    if isinstance(start, str) and start:
        yield start[:num_bytes].encode()[:num_bytes]
    elif isinstance(start, list) and start:
        yield msgspec.json.encode(start[:num_bytes])[:num_bytes]


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    parts = content[:MAX_PARTS] if isinstance(content, list) else ()
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))
