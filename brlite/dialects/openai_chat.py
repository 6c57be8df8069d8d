"""OpenAI's chat completions: one conversation, `n` answers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar, Literal

from msgspec import UNSET, Struct, UnsetType

from brlite.chat.tools import Tool
from brlite.config.options import LimitsConfig
from brlite.dialects.dialect import Dialect
from brlite.dialects.event import EndReason, Event, Token, TokenUsage
from brlite.dialects.fields import NOTHING_MORE, not_supported, not_text
from brlite.dialects.generation import Chat, Generation
from brlite.dialects.json_body import BodyDecoder, check_num_entries, given_twice, missing_field
from brlite.dialects.openai import (
    ReasoningEffort,
    SamplingFields,
    Whole,
    completion_fields,
    sampling_params,
    structured_output,
    take_undecoded,
)
from brlite.dialects.openai_answer import (
    OpenAIEncoder,
    PromptLogprobs,
    ShownLogprob,
    Usage,
    encode_error,
    encode_json,
    shown_logprob,
    shown_prompt_logprobs,
    shown_usage,
)
from brlite.dialects.openai_tools import (
    NO_TOOLS,
    CalledFunction,
    FunctionName,
    ShownCall,
    ShownFunction,
    ToolChoiceObject,
    ToolDefinition,
    ToolFields,
    TurnCall,
    decode_tools,
    shown_calls,
    shown_function,
    turn_calls,
)
from brlite.dialects.sse import frame
from brlite.errors import InvalidRequest

ROLES = ("system", "developer", "user", "assistant", "tool", "function")  # OpenAI's roles; a template may refuse some
MAY_BE_SILENT = ("assistant", "tool", "function")  # clients send null for a turn without text and an empty result
FUNCTION_CALL_ID = "call_function"  # for a call in the older `function_call` form, which has no id


class ContentPart(Struct):
    """A part of a message's content. Only text is supported."""

    no_effect: ClassVar = ("annotations", "cache_control", "logprobs", "parsed", "prompt_cache_breakpoint")

    type: str
    text: str | None = None
    refusal: str | None = None


class ChatMessage(Struct):
    """A turn of a chat. Clients send back what other servers' answers have."""

    no_effect: ClassVar = (
        *("annotations", "id", "parsed"),  # OpenAI
        *("provider_specific_fields", "reasoning_details", "thinking_blocks"),  # LiteLLM, OpenRouter
    )

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning: Any = None
    reasoning_content: Any = None

    tool_calls: list[TurnCall] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None
    audio: Any = None  # not implemented: refused unless null or empty


class ChatCompletionRequest(SamplingFields, kw_only=True):
    messages: list[ChatMessage]
    tools: list[ToolDefinition] | None = None
    tool_choice: str | ToolChoiceObject | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Tool] | None = None
    function_call: str | FunctionName | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: ReasoningEffort | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    max_completion_tokens: Whole | None = None
    echo: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None


ChatEndReason = EndReason | Literal["function_call"]


class ChatLogprobs(Struct):
    content: list[ShownLogprob]
    refusal: None = None


class AssistantMessage(Struct):
    """`content` is null if there are calls and no text, as in OpenAI's API."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ShownCall] | UnsetType = UNSET
    function_call: ShownFunction | UnsetType = UNSET


class ChatChoice(Struct):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatEndReason | None
    stop_reason: str | int | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | UnsetType = UNSET
    warnings: Sequence[str] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Delta(Struct, kw_only=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ShownCall] | UnsetType = UNSET
    function_call: ShownFunction | UnsetType = UNSET


class ChatChunkChoice(Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatEndReason | None = None
    stop_reason: str | int | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | UnsetType = UNSET
    warnings: Sequence[str] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


_DECODER = BodyDecoder(ChatCompletionRequest)
_FIRST_DELTA = Delta(role="assistant", content="", refusal=None)


def decode(data: bytes, limits: LimitsConfig) -> Generation:
    """Decode the body. Raises `InvalidRequest`, naming the field."""
    body, undecoded = _DECODER.decode(data)
    more = take_undecoded(body, undecoded) if undecoded else NOTHING_MORE
    fields = completion_fields(body, more, 1, limits)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    field_names = {"prompt": "messages", "logprobs": "top_logprobs", **more.field_names}
    if body.max_completion_tokens is not None:  # OpenAI's newer name of `max_tokens`
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise given_twice("max_completion_tokens", "max_tokens")
        body.max_tokens = body.max_completion_tokens
        field_names["max_tokens"] = "max_completion_tokens"
    params = sampling_params(
        body,
        limits,
        field_names,
        max_tokens=body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        structured=structured_output(body),
        **more.sampling,
    )
    tools: tuple[Tool, ...] = ()
    tool_choice = NO_TOOLS
    if body.tools or body.functions or body.tool_choice is not None or body.function_call is not None:
        given = ToolFields(**{name: getattr(body, name) for name in ToolFields.__struct_fields__})
        tools, tool_choice = decode_tools(given, limits, len(data))
    chat = read_chat(
        body.messages,
        limits,
        begins_answer=body.add_generation_prompt,
        continues=body.continue_final_message,
        add_special_tokens=bool(body.add_special_tokens),
        tools=() if tool_choice.mode == "none" else tools,
        documents=tuple(body.documents or ()),
        variables=body.chat_template_kwargs or {},
        reasoning_effort=body.reasoning_effort,
    )
    return Generation(
        prompts=(chat,),
        params=params,
        field_names=field_names,
        tool_choice=tool_choice,
        calls_functions=bool(body.functions),
        echoed_text=_text_of(chat.messages[-1]) if body.echo and body.messages[-1].role == "assistant" else "",
        splits_reasoning=body.separate_reasoning is not False,
        shows_reasoning=body.include_reasoning is not False,
        **fields,
    )


def _text_of(turn: dict[str, Any]) -> str:
    content = turn["content"]
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def read_chat(
    messages: list[ChatMessage],
    limits: LimitsConfig,
    *,
    begins_answer: bool | None,
    continues: bool | None,
    **more: Any,
) -> Chat:
    """The messages as a `Chat`; `more` are its other fields. Raises `InvalidRequest`, naming the field.

    The rendered chat ends with the generation prompt, unless `begins_answer` is False, or `continues` is True and the
    answer continues the last message.
    """
    if not messages:
        raise InvalidRequest("messages must hold at least one message", param="messages")
    if len(messages) > limits.max_messages:
        check_num_entries("messages", len(messages), limits, "max_messages")
    if continues and begins_answer:
        raise InvalidRequest(
            "continue_final_message needs add_generation_prompt to be false", param="continue_final_message"
        )
    return Chat(
        [_plain_message(message, index) for index, message in enumerate(messages)],
        not continues and begins_answer is not False,
        bool(continues),
        **more,
    )


def _plain_message(message: ChatMessage, index: int) -> dict[str, Any]:
    """A message as a template takes it. A refusal becomes the content; reasoning stays in a separate key."""
    param, content = f"messages[{index}]", message.content
    if message.role not in ROLES:
        raise InvalidRequest(f"{param}.role must be one of {', '.join(ROLES)}", param=f"{param}.role")
    if message.audio:
        raise not_supported(f"{param}.audio")
    if message.refusal and content:
        raise not_supported(f"{param}.refusal", " beside content")
    if content is None:
        content = message.refusal
    calls = message.tool_calls or ()
    if message.function_call is not None and not calls:
        calls = [TurnCall(message.function_call, id=FUNCTION_CALL_ID)]
    if calls and message.role != "assistant":
        raise InvalidRequest(f"{param}.tool_calls needs the role assistant", param=f"{param}.tool_calls")
    if content is None and not calls:
        if message.role not in MAY_BE_SILENT:
            raise InvalidRequest(f"{param}.content must be a string or a list of text parts", param=f"{param}.content")
        content = ""
    plain: dict[str, Any] = {"role": message.role, "content": content}
    if isinstance(content, list):
        texts = [part_text(part, f"{param}.content[{at}]") for at, part in enumerate(content)]
        plain["content"] = [{"type": "text", "text": text} for text in texts]
    if calls:
        plain["tool_calls"] = turn_calls(calls, f"{param}.tool_calls")
    if message.role == "function":  # the result of the previous turn's call
        plain.update(role="tool", tool_call_id=FUNCTION_CALL_ID)
    elif message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        plain["name"] = message.name
    reasoning = message.reasoning_content or message.reasoning
    if reasoning and isinstance(reasoning, str):  # templates take only strings
        plain["reasoning_content"] = reasoning
    return plain


def part_text(part: ContentPart, param: str, types: Collection[str] = ("text", "refusal")) -> str:
    """The text of a part of one of these types, at the field `param`. Raises `InvalidRequest`."""
    if part.type not in types:
        raise not_text(param, part.type)
    text = part.refusal if part.type == "refusal" else part.text
    if text is None:
        raise missing_field(f"{param}.{'refusal' if part.type == 'refusal' else 'text'}")
    return text


class ChatEncoder(OpenAIEncoder):
    """Encodes events as chunks, or as one whole answer."""

    _empty_text = b'"content":""'
    _has_reasoning = True

    def opening(self, usage: TokenUsage) -> bytes:
        choices = (ChatChunkChoice(index, _FIRST_DELTA) for index in range(self._call.params.n))
        return b"".join(self._chunk([choice], self._no_usage) for choice in choices)

    def _chunk_of(self, event: Event) -> bytes:
        if event.calls and self._call.calls_functions:
            (call,) = event.calls
            delta = Delta(function_call=shown_function(call))
        elif event.calls:
            delta = Delta(tool_calls=shown_calls(event.calls, has_index=True))
        else:
            delta = Delta(reasoning_content=event.reasoning) if event.reasoning else Delta(content=event.text)
        choice = ChatChunkChoice(
            index=event.choice,
            delta=delta,
            logprobs=None if event.tokens is None else self._logprobs(event.tokens),
            finish_reason=event.finish_reason and self._end_reason(event.finish_reason),
            stop_reason=UNSET if event.stop_reason is None else event.stop_reason,
            token_ids=UNSET if event.token_ids is None else event.token_ids,
        )
        usage = self._no_usage if event.usage is None else shown_usage(event.usage, has_reasoning=True)
        return self._chunk([choice], usage, event.warnings, event.prompt_token_ids)

    def whole(self, events: Sequence[Event], usage: TokenUsage, warnings: Sequence[str]) -> bytes:
        """The body of a response that is not streamed. There is one event per choice."""
        is_function = self._call.calls_functions
        choices = [
            ChatChoice(
                index=event.choice,
                message=AssistantMessage(
                    content=event.text or (None if event.calls else ""),
                    reasoning_content=event.reasoning or UNSET,
                    tool_calls=UNSET if is_function or not event.calls else shown_calls(event.calls, has_index=False),
                    function_call=shown_function(event.calls[0]) if is_function and event.calls else UNSET,
                ),
                logprobs=None if event.tokens is None else self._logprobs(event.tokens),
                finish_reason=event.finish_reason and self._end_reason(event.finish_reason),
                stop_reason=event.stop_reason,
                token_ids=UNSET if event.token_ids is None else event.token_ids,
            )
            for event in events
        ]
        prompt_token_ids, prompt_tokens = events[0].prompt_token_ids, events[0].prompt_tokens
        return encode_json(
            ChatCompletion(
                **self._common,
                choices=choices,
                usage=shown_usage(usage, has_reasoning=True),
                warnings=warnings or UNSET,
                prompt_token_ids=UNSET if prompt_token_ids is None else prompt_token_ids,
                prompt_logprobs=UNSET if prompt_tokens is None else shown_prompt_logprobs(prompt_tokens),
            )
        )

    def _end_reason(self, reason: EndReason) -> ChatEndReason:
        return "function_call" if reason == "tool_calls" and self._call.calls_functions else reason

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | UnsetType | None,
        warnings: Sequence[str] = (),
        prompt_token_ids: list[int] | None = None,
    ) -> bytes:
        chunk = ChatChunk(
            **self._common,
            choices=choices,
            usage=usage,
            warnings=warnings or UNSET,
            prompt_token_ids=UNSET if prompt_token_ids is None else prompt_token_ids,
        )
        return frame(encode_json(chunk))

    def _logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs:
        return chat_logprobs(tokens, names_are_ids=self._call.names_are_ids)


def chat_logprobs(tokens: Sequence[Token], *, names_are_ids: bool = False) -> ChatLogprobs:
    """Logprobs as a list of objects. `bytes` has the exact bytes, also for a part of a character."""
    return ChatLogprobs([shown_logprob(token, names_are_ids=names_are_ids) for token in tokens])


DIALECT = Dialect("/v1/chat/completions", "chatcmpl-", decode, ChatEncoder, encode_error)
