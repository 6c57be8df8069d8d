"""Runs a chat template, or a tokenizer that may hang or crash, in a child process (`child_process.py`).

Both are a third party's. Here they can neither hang nor exhaust the server: the kernel ends the process where a message
takes too much CPU time, and bounds its memory. Imports the standard library and one of
jinja2, tokenizers and sentencepiece, never brlite.
"""

from __future__ import annotations

import base64
import json
import os
import re
import resource
import select
import signal
import struct
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from importlib import import_module
from itertools import chain
from typing import Any, NoReturn

MAX_GROWTH = 16  # a rendered chat may be this many times its messages,
MAX_MARKUP = 64 * 1024  # and so many characters more
MAX_REASON = 300
# What stands inside a control token's text that a message spells out: the first of these that no message has.
MARKS = (range(0xFDD0, 0xFDF0), range(0xF0000, 0xFFFFE))
PROBE = "a7c4e1b6"  # a content that no template has
# By role, a short chat that has such a message, which a template that knows the role writes or refuses.
PROBES: dict[str, list[dict[str, str]]] = {
    "system": [{"role": "system", "content": PROBE}, {"role": "user", "content": "a"}],
    "tool": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "tool", "content": PROBE},
        {"role": "user", "content": "c"},
    ],
}
PROBES["function"] = [{**message, "role": message["role"].replace("tool", "function")} for message in PROBES["tool"]]

LENGTH = struct.Struct(">I")  # of a message, in bytes


class Renderer:
    """One compiled template. `controls` are the texts of control tokens, `variables` what it may name."""

    def __init__(self, template: str, controls: Sequence[str], variables: Mapping[str, str]) -> None:
        self._template = _environment().from_string(template)
        self._variables = variables
        self._controls = _starts_of(controls)

    def describe(self) -> dict[str, Any]:
        """The roles whose messages the template leaves out without a word."""
        return {"unsaid_roles": [role for role, messages in PROBES.items() if self._leaves_out(messages)]}

    def answer(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> dict[str, Any]:
        """The text and, where a message spells out a control token, the mark behind that token's first character."""
        encoded = json.dumps(messages, ensure_ascii=False)
        mark = None
        if self._controls is not None:
            mark = next(char for char in map(chr, chain(*MARKS)) if char not in encoded)
            marked = [_marked(message, self._controls, mark) for message in messages]
            mark, messages = (None, messages) if marked == messages else (mark, marked)
        # Requests with tools are refused so far. Whoever passes them here must mark them as the messages are: their
        # names and descriptions are a user's text, too.
        pieces = self._template.generate(
            messages=messages, add_generation_prompt=add_generation_prompt, tools=None, **self._variables
        )
        return {"text": _join(pieces, MAX_GROWTH * len(encoded) + MAX_MARKUP), "mark": mark}

    def _leaves_out(self, messages: list[dict[str, str]]) -> bool:
        try:
            return PROBE not in self.answer(list(messages), add_generation_prompt=True)["text"]
        except Exception:  # it refuses the role, or this chat of it, and the request that uses it gets the error
            return False


class TextEncoder:
    """Tokenizers of the `tokenizers` package, as JSON."""

    def __init__(self, tokenizers: Sequence[str]) -> None:
        self._tokenizers = [import_module("tokenizers").Tokenizer.from_str(text) for text in tokenizers]

    def describe(self) -> dict[str, Any]:
        return {}

    def answer(self, index: int, text: str, *, add_special_tokens: bool) -> dict[str, Any]:
        return {"ids": self._tokenizers[index].encode(text, add_special_tokens=add_special_tokens).ids}


class SentencePieceWorker:
    """A sentencepiece model, as base64."""

    def __init__(self, sentencepiece: str) -> None:
        processor = import_module("sentencepiece").SentencePieceProcessor
        self._processor = processor(model_proto=base64.b64decode(sentencepiece))

    def describe(self) -> dict[str, Any]:
        return {
            "num_pieces": self._processor.get_piece_size(),
            "eos_token_id": self._processor.eos_id(),
            "starts_with_space": "".join(self._processor.encode("a", out_type=str)).startswith("▁"),
        }

    def answer(self, text: str) -> dict[str, Any]:
        return {"ids": self._processor.encode(text)}


# By the name in the first message that only this one has.
WORKERS = {"template": Renderer, "tokenizers": TextEncoder, "sentencepiece": SentencePieceWorker}


def _starts_of(controls: Sequence[str]) -> re.Pattern[str] | None:
    """Matches the first character of each control token's text, overlapping ones too."""
    rests: dict[str, list[str]] = {}
    for text in controls:
        rests.setdefault(text[0], []).append(re.escape(text[1:]))
    if not rests:
        return None
    return re.compile("|".join(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()))


def _marked(value: Any, controls: re.Pattern[str], mark: str) -> Any:
    """`value` with the mark in every control token's text, but for roles, which the template may make tokens of."""
    if isinstance(value, str):
        return controls.sub(rf"\g<0>{mark}", value)
    if isinstance(value, list):
        return [_marked(item, controls, mark) for item in value]
    if isinstance(value, dict):
        return {
            _marked(key, controls, mark): item if key == "role" else _marked(item, controls, mark)
            for key, item in value.items()
        }
    return value


def _environment() -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %}` marks what a model says, for training; here its body is rendered as it stands."""

        def __init__(self, environment: jinja2.Environment) -> None:
            super().__init__(environment)
            self.tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateRuntimeError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=raise_exception, strftime_now=_strftime_now)
    return environment


def _strftime_now(date_format: str) -> str:
    return datetime.now().strftime(date_format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no model has seen in training.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _join(pieces: Iterable[str], max_length: int) -> str:
    kept: list[str] = []
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > max_length:
            raise ValueError(f"it writes more than {max_length} characters for these messages")
        kept.append(piece)
    return "".join(kept)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error)[: 4 * MAX_REASON].split()) or type(error).__name__
    return text if len(text) <= MAX_REASON else text[:MAX_REASON] + "…"


def _serve() -> None:
    setup = _receive()
    assert setup is not None, "the limits come first"
    sys.path += setup["paths"]
    for name in setup["packages"]:
        import_module(name)  # the limits are not meant for this
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], setup["memory_bytes"]))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # its default is to end the process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    too_much = f"it needs more than {setup['memory_bytes']} bytes of memory"
    out_of_memory = encode_message({"error": too_much, "is_last": True})
    worker: Renderer | TextEncoder | SentencePieceWorker | None = None
    _send(encode_message({}))
    while (message := _receive()) is not None:
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
        try:
            if worker is None:
                worker = next(make for name, make in WORKERS.items() if name in message)(**message)
                data = encode_message(worker.describe())
            else:
                data = encode_message(worker.answer(**message))
        except MemoryError:
            data = out_of_memory
        except BaseException as error:  # a template's are Python's own; a panic of Rust's is no Exception
            data = encode_message({"error": _one_line(error)})
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(data)
        if data is out_of_memory:
            return


def _receive() -> dict[str, Any] | None:
    """The next message; None when the sender is gone."""
    head = _read(LENGTH.size)
    body = head and _read(LENGTH.unpack(head)[0])
    return json.loads(body) if body else None


def _read(length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        _await_input()
        part = os.read(0, min(length - len(data), 1024 * 1024))
        if not part:
            return b""
        data += part
    return bytes(data)


def _await_input() -> None:
    """Wait for input, and end with the parent: a forked copy of it may keep our input open."""
    ready, _, _ = select.select([0, *_PARENT], [], [])
    if 0 not in ready:
        sys.exit(0)


def encode_message(message: Mapping[str, Any]) -> bytes:
    """A message with its length before it, as both sides send it."""
    data = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return LENGTH.pack(len(data)) + data


def _send(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


def _watch_parent() -> list[int]:
    try:
        return [os.pidfd_open(os.getppid())]
    except (AttributeError, OSError):  # another kernel, or a parent in another namespace of processes
        return []


if __name__ == "__main__":
    _PARENT = _watch_parent()
    _serve()
