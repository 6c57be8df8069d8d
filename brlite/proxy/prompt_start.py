"""What prompts with the same beginning have in common: what `choice = "prefix"` chooses an upstream by.

A prefix cache can be of use for all that stands before the first user message, so all of it counts, however long: a
system prompt, instructions, tools, earlier examples. Reads bodies of chats, completions, `/v1/messages` and
`/v1/responses`; it knows no models and no upstreams.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import msgspec

from brlite.files.text_file import BYTE_ORDER_MARK

DIGEST_BYTES = 16
_NULL = msgspec.Raw(b"null")


class _Prompt(msgspec.Struct):
    """What may begin a prompt; None and null are absent."""

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
    """A digest of the beginning of the body's prompt; b"" if it has none, or is not what it should be.

    Of the first user message, and of a completion's (first) prompt, only the first `num_bytes` count.
    """
    digest = blake2b(digest_size=DIGEST_BYTES)
    is_empty = True
    try:
        for part in _parts(_PROMPT.decode(body.removeprefix(BYTE_ORDER_MARK)), num_bytes):
            # Its length keeps a part apart from the next one.
            digest.update(b"%d:" % len(part))
            digest.update(part)
            is_empty = False
    except (msgspec.MsgspecError, UnicodeDecodeError, UnicodeEncodeError, RecursionError):
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
        if messages and not bytes(messages[0]).startswith(b"{"):  # texts or tokens, as of `/v1/embeddings`
            messages = None
    if messages:
        yield from _parts_of_chat(messages, num_bytes)
        return
    start = _start_of_text(msgspec.json.decode(prompt.prompt if prompt.prompt != _NULL else prompt.input), num_bytes)
    if start:
        yield start


def _parts_of_chat(messages: list[msgspec.Raw], num_bytes: int) -> Iterator[bytes]:
    for raw in messages:
        message = _MESSAGE.decode(raw)
        text = _text(message.content)
        yield str(message.role).encode()
        if message.role == "user":
            yield text.encode()[:num_bytes]
            return
        yield text.encode()


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))


def _start_of_text(prompt: object, num_bytes: int) -> bytes:
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]  # several prompts
    if isinstance(prompt, str):
        return prompt[:num_bytes].encode()[:num_bytes]
    if isinstance(prompt, list) and prompt:
        return msgspec.json.encode(prompt[:num_bytes])[:num_bytes]
    return b""
