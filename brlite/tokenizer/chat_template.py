"""A model's chat template: Jinja in its immutable sandbox, compiled once, over plain data.

The template comes from the operator's files, never from a request. Knows no token ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from brlite.errors import InvalidRequest, ModelError
from brlite.text_file import TextError
from brlite.text_file import read_text as read_text_file

_MAX_GROWTH = 16  # a rendered chat may be this many times its messages,
_MAX_MARKUP = 64 * 1024  # and so many characters more
_MAX_REASON = 300
# What a template that is given a chat it does not understand may raise: its operations are Python's own.
_RENDER_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """Renders chats. `special_tokens` are texts it may name, such as `bos_token`; those a model lacks are absent."""

    def __init__(self, template: str, *, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises `ModelError`, naming `source`, for a template that does not compile."""
        self.text = template
        try:
            self._template = _environment().from_string(template)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelError(f"{source}: the chat template is broken: {_one_line(error)}") from None
        self._special_tokens = dict(special_tokens)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """The chat as text. Raises `InvalidRequest` if the template refuses it, fails, or writes far too much."""
        try:
            encoded = json.dumps([dict(message) for message in messages], ensure_ascii=False)
            pieces = self._template.generate(
                messages=json.loads(encoded),  # a copy of plain dicts, lists and strings, whatever came in
                add_generation_prompt=add_generation_prompt,
                tools=None,
                **self._special_tokens,
            )
            return _join(pieces, _MAX_GROWTH * len(encoded) + _MAX_MARKUP)
        except _RENDER_ERRORS as error:
            raise template_refusal(_one_line(error)) from None


def template_refusal(reason: str) -> InvalidRequest:
    """The error for a chat that a model's format cannot say."""
    return InvalidRequest(
        f"Error in applying chat template from request: {reason}; /v1/completions takes a prompt without a template",
        param="messages",
    )


def read_template(path: Path) -> str:
    """The text of the operator's template file."""
    try:
        return read_text_file(path)
    except TextError as error:
        raise ModelError(f"chat template {path}: {error}") from None


class _GenerationTag(Extension):
    """`{% generation %}` marks what a model says, for training; here its body is rendered as it stands."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def _join(pieces: Iterable[str], max_length: int) -> str:
    kept: list[str] = []
    length = 0
    for piece in pieces:
        length += len(piece)
        if length > max_length:
            raise jinja2.TemplateRuntimeError(f"it writes more than {max_length} characters for these messages")
        kept.append(piece)
    return "".join(kept)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MAX_REASON else text[:_MAX_REASON] + "…"


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateRuntimeError(message)


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
