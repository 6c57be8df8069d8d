"""The endpoints of the tokenizer, in vLLM's words and in llama.cpp's, and those that show what a request comes to."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType

from brlite.config.options import LimitsConfig
from brlite.dialects.event import TokenText
from brlite.dialects.fields import check_undecoded
from brlite.dialects.generation import Chat, Text
from brlite.dialects.json_body import BodyDecoder
from brlite.dialects.openai_chat import ChatMessage, read_chat
from brlite.dialects.openai_tools import ToolDefinition, ToolFields, decode_tools
from brlite.errors import InvalidRequest


class TokenizeRequest(Struct, kw_only=True):
    """`content`, `add_special` and `with_pieces` are llama.cpp's, the others vLLM's."""

    model: str | None = None
    content: str | None = None
    add_special: bool | None = None
    with_pieces: bool | None = None
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


class TokenPiece(Struct):
    """A token as llama.cpp tells it; the bytes of a part of a character are a list."""

    id: int
    piece: str | list[int]


class TokenizeAnswer(Struct):
    count: int
    max_model_len: int
    tokens: list[int | TokenPiece]
    token_strs: list[str] | UnsetType = UNSET
    warnings: tuple[str, ...] | UnsetType = UNSET


class DetokenizeAnswer(Struct):
    """The text by both names: vLLM's and llama.cpp's."""

    prompt: str
    content: str
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


class AppliedTemplate(Struct):
    """What llama.cpp's `/apply-template` answers."""

    prompt: str
    warnings: tuple[str, ...] | UnsetType = UNSET


class RenderedRequest(Struct, kw_only=True):
    """What vLLM's `render` answers: the request as the engine gets it, and the prompt's text beside its tokens."""

    request_id: str
    model: str
    prompt: str
    token_ids: list[int]
    sampling_params: dict[str, Any]
    features: None = None
    cache_salt: str | None = None
    stream: bool = False
    warnings: tuple[str, ...] | UnsetType = UNSET


_TOKENIZE = BodyDecoder(TokenizeRequest)
_DETOKENIZE = BodyDecoder(DetokenizeRequest)
_OPTION_OWNERS = {
    **dict.fromkeys(("add_generation_prompt", "continue_final_message", "tools", "chat_template_kwargs"), "messages"),
    **dict.fromkeys(("add_special", "with_pieces"), "content"),
}


class Tokenization(Struct, frozen=True):
    """What is to be tokenized. With `has_pieces` each token stands in the answer with its text."""

    model: str | None
    prompt: Chat | Text
    names_tokens: bool
    has_pieces: bool
    warnings: tuple[str, ...]


def decode_tokenize(data: bytes, limits: LimitsConfig) -> Tokenization:
    """Exactly one of `prompt`, `messages` and `content`, with its own options. Raises `InvalidRequest`."""
    body, undecoded = _TOKENIZE.decode(data)
    warnings = check_undecoded(undecoded, generates=False)
    given = [name for name in ("prompt", "messages", "content") if getattr(body, name) is not None]
    if len(given) != 1:
        raise InvalidRequest("give one of prompt, messages and content", param="prompt")
    (kind,) = given
    if kind == "messages" and body.add_special_tokens:
        raise InvalidRequest(
            "add_special_tokens needs prompt: the chat template writes those of messages", param="add_special_tokens"
        )
    for name, owner in _OPTION_OWNERS.items():
        if kind != owner and getattr(body, name):
            raise InvalidRequest(f"{name} needs {owner}", param=name)

    prompt: Chat | Text
    if body.content is not None:
        prompt = Text(body.content, bool(body.add_special))
    elif body.messages is None:
        prompt = Text(body.prompt or "", body.add_special_tokens is not False)
    else:
        tools, _ = decode_tools(ToolFields(tools=body.tools), limits)
        prompt = read_chat(
            body.messages,
            limits,
            begins_answer=body.add_generation_prompt,
            continues=body.continue_final_message,
            tools=tools,
            variables=body.chat_template_kwargs or {},
        )
    return Tokenization(body.model, prompt, bool(body.return_token_strs), bool(body.with_pieces), warnings)


def token_piece(token: TokenText) -> TokenPiece:
    """The token as llama.cpp tells it."""
    return TokenPiece(token.token_id, token.text if token.text.encode() == token.data else list(token.data))


def decode_detokenize(data: bytes) -> tuple[DetokenizeRequest, tuple[str, ...]]:
    """The tokens, and a warning for each unknown field. Raises `InvalidRequest`."""
    body, undecoded = _DETOKENIZE.decode(data)
    return body, check_undecoded(undecoded, generates=False)
