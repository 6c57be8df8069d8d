"""What a client asks for, in no dialect: frozen values, decoded and checked once.

`decode` of each dialect makes a `Generation`. What needs the model (lengths, the vocabulary) is checked by the engine,
in its own names of fields; `in_client_words` turns such a refusal into the client's names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    """Whether the model is to reason, and how much, where its template has a variable for it; else there is a warning.

    `effort_field` is the client's name of the effort.
    """

    is_on: bool
    effort: str | None
    effort_field: str


class Chat(Struct, frozen=True):
    """A conversation. Turns have the shape of OpenAI's API, with calls of tools and their results.

    With `add_special_tokens` the tokenizer's own stand around what the template wrote. `tools` are those that the model
    is told of, `variables` the template's own (`chat_template_kwargs`). Where the template takes no effort,
    `reasoning_effort` is refused, and a `reasoning_hint` is not.
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

    The answer goes on behind `start`, which is no part of it. `files` are the names and texts of other files.
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
    """A call: prompts to continue, each `params.n` times, and how the answer is told.

    `model` is the name that the client wrote; None where it left it out. With `echo` each completion begins with its
    prompt, with `is_echo_only` it is nothing else; a chat's begins with `echoed_text`. `continuous_usage` puts the
    usage so far into every chunk of a stream, `names_are_ids` tells tokens in logprobs by their ids. `field_names` maps
    the engine's names of fields to the client's, where they differ. `warnings` are told with the answer. A chat's
    reasoning is told apart from its text with `splits_reasoning`, and left out without `shows_reasoning`.
    `calls_functions`: calls are told as OpenAI's `function_call`, the form before tools. With `keeps_order` a response
    that is not streamed tells texts and calls in the order in which they were written; else all text is before the
    calls. `unset` are the sampling parameters that the client left out, of those that a model may have defaults for.
    `timeout_seconds` is when the client wants an error in place of the rest. Requests with a lower `priority` come
    first; None: that of the key. With `is_strict`, what would be a warning is refused.
    `tells_token_ids`: those of prompt and answer are told; the prompt's logprobs with `tells_prompt_logprobs`.
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
    tells_token_ids: bool = False
    tells_prompt_logprobs: bool = False


def refuse_warnings(warnings: Iterable[str]) -> None:
    """Raise `InvalidRequest` for the first of what a strict call would have been warned of."""
    for warning in warnings:
        raise InvalidRequest(f"{warning}; that is refused since strict is set", code="strict")


def in_client_words(error: InvalidRequest, field_names: Mapping[str, str]) -> InvalidRequest:
    """The refusal with the client's name of the field that the engine named."""
    name = field_names.get(error.param or "")
    if name is None:
        return error
    message = str(error)
    if message.startswith(f"{error.param} "):
        message = name + message.removeprefix(str(error.param))
    told = copy(error)
    told.args, told.param = (message,), name
    return told
