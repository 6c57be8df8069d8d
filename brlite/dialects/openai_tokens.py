"""The tokenizer's endpoints, in vLLM's and llama.cpp's shapes, and those that show the rendered prompt of a request."""

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
    """`content`, `add_special` and `with_pieces` are llama.cpp's fields, the others vLLM's."""

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
    """A token in llama.cpp's shape. A part of a character is a list of bytes."""

    id: int
    piece: str | list[int]


class TokenizeAnswer(Struct):
    count: int
    max_model_len: int
    tokens: list[int | TokenPiece]
    token_strs: list[str] | UnsetType = UNSET
    warnings: tuple[str, ...] | UnsetType = UNSET


class DetokenizeAnswer(Struct):
    """The text under both names, vLLM's and llama.cpp's."""

    prompt: str
    content: str
    warnings: tuple[str, ...] | UnsetType = UNSET


class MessageTokens(Struct, kw_only=True):
    """Anthropic's count of a chat's tokens."""

    input_tokens: int
    warnings: tuple[str, ...] | UnsetType = UNSET


class InputTokens(MessageTokens, kw_only=True):
    """OpenAI's count of the tokens of a response's input."""

    object: str = "response.input_tokens"


class TokenizerInfo(Struct, kw_only=True):
    """vLLM's shape, whose keys lm-eval reads. `null` means that the model lacks the token or template."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None
    model_max_length: int
    vocab_size: int


class AppliedTemplate(Struct):
    """The answer of llama.cpp's `/apply-template`."""

    prompt: str
    warnings: tuple[str, ...] | UnsetType = UNSET


class RenderedRequest(Struct, kw_only=True):
    """The answer of vLLM's `render`: the request that the engine gets, and the prompt as tokens and text."""

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
    """A prompt to tokenize. With `has_pieces` the answer has the text of each token."""

    model: str | None
    prompt: Chat | Text
    names_tokens: bool
    has_pieces: bool
    warnings: tuple[str, ...]
    is_strict: bool = False  # set on a strict server


class Detokenization(Struct, frozen=True):
    """Tokens whose text is wanted."""

    model: str | None
    token_ids: list[int]
    warnings: tuple[str, ...]
    is_strict: bool = False  # set on a strict server


def decode_tokenize(data: bytes, limits: LimitsConfig) -> Tokenization:
    """Decode the body, which has exactly one of `prompt`, `messages` and `content`. Raises `InvalidRequest`."""
    body, undecoded = _TOKENIZE.decode(data)
    warnings = check_undecoded(undecoded, body.__struct_fields__, generates=False)
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
    """The token in llama.cpp's shape."""
    return TokenPiece(token.token_id, token.text if token.text.encode() == token.data else list(token.data))


def decode_detokenize(data: bytes, limits: LimitsConfig) -> Detokenization:
    """Decode the body. Raises `InvalidRequest`."""
    body, undecoded = _DETOKENIZE.decode(data)
    return Detokenization(body.model, body.tokens, check_undecoded(undecoded, body.__struct_fields__, generates=False))
