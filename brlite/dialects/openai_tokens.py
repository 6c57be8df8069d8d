"""vLLM's endpoints of the tokenizer: /tokenize, /detokenize and /tokenizer_info."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from brlite.config.options import LimitsConfig
from brlite.dialects.fields import check_undecoded
from brlite.dialects.generation import Chat, Text
from brlite.dialects.json_body import BodyDecoder
from brlite.dialects.openai import ChatMessage, has_generation_prompt, plain_messages
from brlite.dialects.openai_tools import ToolDefinition, ToolFields, decode_tools
from brlite.errors import InvalidRequest


class TokenizeRequest(Struct, kw_only=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[ToolDefinition] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Struct, kw_only=True):
    tokens: list[int]
    model: str | None = None


class TokenizeAnswer(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | UnsetType = UNSET
    warnings: tuple[str, ...] | UnsetType = UNSET


class DetokenizeAnswer(Struct):
    prompt: str
    warnings: tuple[str, ...] | UnsetType = UNSET


class TokenizerInfo(Struct, kw_only=True):
    """As vLLM's, whose keys lm-eval reads. `null` is a token or template that the model lacks."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None
    model_max_length: int
    vocab_size: int


_TOKENIZE = BodyDecoder(TokenizeRequest)
_DETOKENIZE = BodyDecoder(DetokenizeRequest)


class Tokenization(Struct, frozen=True):
    """What is to be tokenized."""

    model: str | None
    prompt: Chat | Text
    names_tokens: bool
    warnings: tuple[str, ...]


def decode_tokenize(data: bytes, limits: LimitsConfig) -> Tokenization:
    """Exactly one of `prompt` and `messages`, and only the options that belong to it. Raises `InvalidRequest`."""
    body, undecoded = _TOKENIZE.decode(data)
    warnings = check_undecoded(undecoded)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    if body.messages is not None and body.add_special_tokens:
        raise InvalidRequest(
            "add_special_tokens needs prompt: the chat template writes those of messages", param="add_special_tokens"
        )
    for name in ("add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs"):
        if body.prompt is not None and getattr(body, name):
            raise InvalidRequest(f"{name} needs messages", param=name)

    prompt: Chat | Text
    if body.messages is None:
        prompt = Text(body.prompt or "", body.add_special_tokens is not False)
    else:
        begins = has_generation_prompt(add=body.add_generation_prompt, continues=body.continue_final_message)
        tools, _ = decode_tools(ToolFields(tools=body.tools), limits)
        prompt = Chat(
            plain_messages(body.messages, limits),
            begins,
            bool(body.continue_final_message),
            tools=tools,
            variables=body.chat_template_kwargs or {},
        )
    return Tokenization(body.model, prompt, bool(body.return_token_strs), warnings)


def decode_detokenize(data: bytes) -> tuple[DetokenizeRequest, tuple[str, ...]]:
    """The tokens, and a warning for each unknown field. Raises `InvalidRequest`."""
    body, undecoded = _DETOKENIZE.decode(data)
    return body, check_undecoded(undecoded)
