"""Requests, independent of dialects: frozen values, decoded and checked once.

`decode` of each dialect makes a `Generation`. The engine checks what depends on the model (lengths, the vocabulary).
Its errors have the engine's field names; `in_client_words` replaces them by the client's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from typing import Annotated, Any

from msgspec import Meta, Struct

from brlite.chat.tools import Tool, ToolChoice
from brlite.errors import InvalidRequest
from brlite.sampling_params import SamplingParams

MAX_TIMEOUT_SECONDS = 86400
Timeout = Annotated[float, Meta(gt=0, le=MAX_TIMEOUT_SECONDS)]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]


class ReasoningHint(Struct, frozen=True):
    """Whether and how much the model should reason. If its template has no variable for that, there is a warning.

    `effort_field` is the client's field name of the effort.
    """

    is_on: bool
    effort: str | None
    effort_field: str


class Chat(Struct, frozen=True):
    """A conversation. Turns have the shape of OpenAI's API, with tool calls and their results.

    With `add_special_tokens` the tokenizer adds its special tokens to the rendered chat. `tools` are given to the
    template, and so are `variables` (`chat_template_kwargs`). If the template has no variable for the effort,
    `reasoning_effort` is refused; a `reasoning_hint` is not.
    """

    messages: list[dict[str, Any]]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    tools: tuple[Tool, ...] = ()
    documents: tuple[dict[str, Any], ...] = ()
    variables: Mapping[str, Any] = {}
    reasoning_effort: str | None = None
    reasoning_hint: ReasoningHint | None = None


class Text(Struct, frozen=True):
    """A text to continue."""

    text: str
    add_special_tokens: bool = True


class Infill(Struct, frozen=True):
    """A gap to fill between two texts, any of which may be empty.

    The answer continues `start`, but does not include it. `files` are the names and texts of other files.
    """

    before: str
    after: str
    start: str = ""
    files: tuple[tuple[str, str], ...] = ()
    add_special_tokens: bool = True


class TokenIds(Struct, frozen=True):
    """Tokens to continue, as the client sent them."""

    token_ids: list[int]


Prompt = Chat | Text | Infill | TokenIds


class Truncation(Struct, frozen=True):
    """How many tokens of a longer prompt are kept; None: as many as leave room for the completion."""

    num_tokens: int | None
    keeps_start: bool = False


class Generation(Struct, frozen=True, kw_only=True):
    """A call: prompts to continue, each `params.n` times, and the form of the answer.

    - `model`: the name that the client sent, or None.
    - `continuous_usage`: every chunk of a stream has the usage so far.
    - `names_are_ids`: logprobs name tokens by their ids.
    - `echo`: each completion begins with its prompt; `is_echo_only`: and has nothing else; a chat's answer begins with
      `echoed_text`.
    - `field_names`: the engine's field names, mapped to the client's, where they differ.
    - `warnings`: sent with the answer.
    - `calls_functions`: tool calls have the form of OpenAI's older `function_call`.
    - `keeps_order`: a response that is not streamed keeps the order of texts and calls; else all text comes first.
    - `splits_reasoning`: a chat's reasoning is separate from its text; without `shows_reasoning` it is left out.
    - `unset`: the sampling parameters of `MODEL_DEFAULTS` that the client left out.
    - `timeout_seconds`: after this time an error ends the answer.
    - `priority`: lower values are served first; None: the key's.
    - `is_strict`: the request is refused if there would be a warning.
    - `returns_token_ids`: the answer has the token ids of prompt and answer; `returns_prompt_logprobs`: the prompt's
      logprobs.
    - `make_text_end`: makes a function that is called with each piece of the answer's text. If it returns True, the
      generation ends there.
    """

    model: str | None
    prompts: tuple[Prompt, ...]
    params: SamplingParams
    is_streamed: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    names_are_ids: bool = False
    echo: bool = False
    is_echo_only: bool = False
    echoed_text: str = ""
    truncation: Truncation | None = None
    cache_salt: str = ""
    field_names: Mapping[str, str] = {}
    warnings: tuple[str, ...] = ()
    tool_choice: ToolChoice = ToolChoice(mode="none")
    calls_functions: bool = False
    keeps_order: bool = False
    splits_reasoning: bool = True
    shows_reasoning: bool = True
    unset: tuple[str, ...] = ()
    timeout_seconds: float | None = None
    priority: int | None = None
    is_strict: bool = False
    returns_token_ids: bool = False
    returns_prompt_logprobs: bool = False
    make_text_end: Callable[[], Callable[[str], bool]] | None = None


def refuse_warnings(warnings: Iterable[str]) -> None:
    """Raise `InvalidRequest` for the first warning of a strict call."""
    for warning in warnings:
        raise InvalidRequest(f"{warning}; that is refused since strict is set", code="strict")


def in_client_words(error: InvalidRequest, field_names: Mapping[str, str]) -> InvalidRequest:
    """The error, with the engine's field name replaced by the client's."""
    name = field_names.get(error.param or "")
    if name is None:
        return error
    message = str(error)
    if message.startswith(f"{error.param} "):
        message = name + message.removeprefix(str(error.param))
    renamed = copy(error)
    renamed.args, renamed.param = (message,), name
    return renamed
