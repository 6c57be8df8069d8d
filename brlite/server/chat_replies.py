"""For one chat call and one model: the template variables, the grammar of the replies, and the reply parser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from brlite.chat.formats import ChatFormat
from brlite.chat.reasoning import ReasoningTokenCounter, ends_inside
from brlite.chat.reply import ReplyFormat, ReplyParser
from brlite.chat.tool_calls import ToolCallParser, harmony
from brlite.chat.tools import Tool, ToolChoice
from brlite.chat.turns import TemplateExtras
from brlite.config.options import ModelSpec
from brlite.dialects.fields import MAX_REPORTED_FIELDS, not_supported
from brlite.dialects.generation import Chat, Generation
from brlite.errors import InvalidRequest
from brlite.sampling_params import CallPart, Calls, ParameterNotation, Reasoning, StructuredOutput
from brlite.tokenizer import Tokenizer

NUM_END_TOKENS = 16  # the last tokens of a prompt: enough to detect that it ends inside the reasoning
NO_ARGUMENTS = '{"type":"object","properties":{},"additionalProperties":false}'
# Keywords with which a schema may require or allow properties that are not in `properties`.
MORE_PROPERTIES = frozenset(
    {"additionalProperties", "unevaluatedProperties", "patternProperties", "minProperties", "allOf", "anyOf", "oneOf"}
    | {"$ref", "$dynamicRef", "if", "then", "else", "dependentSchemas", "dependentRequired", "dependencies"}
)
# Template variables that switch reasoning on or off. The request's `reasoning_effort` sets them if the template has no
# variable of that name.
THINKING_SWITCHES = ("enable_thinking", "thinking")
NO_REASONING_EFFORTS = ("none", "minimal")


class _Outline(msgspec.Struct):
    """The properties of a schema, still encoded."""

    properties: dict[str, msgspec.Raw]
    required: list[str] = []


class ChatReplies:
    """Reads the replies of one call. `is_constrained` is set when a grammar guarantees that calls parse."""

    def __init__(self, call: Generation, chat: Chat, tokenizer: Tokenizer, reply_format: ReplyFormat) -> None:
        self.is_constrained = False
        self._choice = call.tool_choice
        self._tools = call.tool_choice.allowed(chat.tools)
        self._splits_reasoning = call.splits_reasoning
        self._tokenizer = tokenizer
        self._format = reply_format
        self._begins_inside = self._is_over = False  # state of the reasoning at the end of the prompt

    def begin(self, prompt_token_ids: Sequence[int]) -> None:
        """Find out whether the reasoning is open or closed at the end of the prompt. Call it before `structured`."""
        if self._format.marks is not None:
            end = self._tokenizer.decode(prompt_token_ids[-NUM_END_TOKENS:], skip_special_tokens=False)
            self._begins_inside = ends_inside(end, self._format.marks)
            self._is_over = end.rstrip().endswith(self._format.marks[1])

    def shown_token_ids(self) -> frozenset[int]:
        """The special tokens that mark calls and reasoning. They must stay in the text, since the parser needs them."""
        texts = [*(self._format.calls.marks if self._reads_calls and self._format.calls else ())]
        if self._splits_reasoning:
            texts += self._format.marks or ()
        found = map(self._tokenizer.special_token_id, texts)
        return frozenset(token_id for token_id in found if token_id is not None)

    def structured(self, wish: StructuredOutput | None) -> StructuredOutput | None:
        """The grammar of the whole reply: `wish`, the grammar of the answer, with the reasoning and the calls added.

        None if the reply is not constrained. Raises `InvalidRequest` if calls in this format have no grammar.
        """
        calls = self._calls()
        if calls is None and wish is None:
            return None
        reasoning = None
        if self._format.reads_all:
            reasoning = Reasoning(begins=harmony.PREAMBLES, end=harmony.PREAMBLE_END, answer_begin=harmony.FINAL)
        elif self._format.marks is not None and not self._is_over:
            begin, end = self._format.marks
            reasoning = Reasoning(begins=(begin,), end=end, begins_inside=self._begins_inside)
        if wish is None or (calls is not None and calls.is_forced):
            return StructuredOutput(calls=calls, reasoning=reasoning, param="tools")
        param = wish.param if calls is None else "tools"
        return msgspec.structs.replace(wish, calls=calls, reasoning=reasoning, param=param)

    def _calls(self) -> Calls | None:
        """The grammar of calls; None without tools."""
        if not self._tools:
            return None
        parser, is_forced = self._format.calls, self._choice.mode == "required"
        calls = None if parser is None else call_grammar(parser, self._tools, self._choice)
        if calls is None:
            name = "none" if parser is None else parser.name
            strict = next((tool.name for tool in self._tools if tool.strict), None)
            what = "calls" if strict is None else f"strict of {strict}: calls"
            raise not_supported(
                "tool_choice" if is_forced else "tools", f": {what} in the format {name} have no grammar"
            )
        return calls

    @property
    def must_constrain(self) -> bool:
        """Whether a schema that cannot be enforced is an error: if calls are forced or a function is strict."""
        return self._choice.mode == "required" or any(tool.strict for tool in self._tools)

    def token_counter(self) -> ReasoningTokenCounter | None:
        """A counter of the reasoning tokens of one reply. None for a model without reasoning."""
        if self._format.reads_all:
            marks = (harmony.PREAMBLES[0], harmony.ENDS[0])
            return ReasoningTokenCounter(marks, begins_inside=False, several=True)
        if self._format.marks is None:
            return None
        return ReasoningTokenCounter(self._format.marks, begins_inside=self._begins_inside)

    def parser(self) -> ReplyParser:
        """A parser for one reply."""
        calls = None
        if self._reads_calls and self._format.calls is not None:
            calls = self._format.calls(
                self._tools,
                max_calls=2**31 if self._choice.parallel else 1,
                streams_arguments=self.is_constrained,
            )
        marks = self._format.marks if self._splits_reasoning else None
        return ReplyParser(marks=marks, begins_inside=self._begins_inside, calls=calls)

    @property
    def _reads_calls(self) -> bool:
        return bool(self._tools) or self._format.reads_all


def call_grammar(parser: type[ToolCallParser], tools: Sequence[Tool], choice: ToolChoice) -> Calls | None:
    """The grammar of calls of these tools. None if the format cannot express a call of one of them."""
    grammars = [parser.grammar(tool) for tool in tools]
    first = grammars[0]
    if first is None:
        return None
    parts: list[CallPart] = []
    for tool, grammar in zip(tools, grammars, strict=True):
        if grammar is None:
            return None
        parts.append(
            CallPart(
                label=tool.name,
                trigger=grammar.trigger,
                begin=grammar.begin,
                schema=_closed(tool.schema_text()),
                end=grammar.end,
                parameters=None if grammar.parameters is None else ParameterNotation(**grammar.parameters),
            )
        )
    return Calls(
        parts=tuple(parts),
        opening=first.opening,
        separator=first.separator,
        closing=first.closing,
        is_forced=choice.mode == "required",
        is_single=first.is_single or not choice.parallel,
        is_leading=first.is_leading,
    )


def _closed(text: bytes) -> str:
    """The schema of a function's arguments with `additionalProperties: false`. Without one there are no arguments.

    By default JSON Schema allows properties that are not listed. A client would pass them to its function, which fails.
    """
    try:
        schema = msgspec.json.decode(text, type=dict[str, msgspec.Raw] | None)
        if not schema:
            return NO_ARGUMENTS
        outline = msgspec.json.decode(text, type=_Outline)
    except msgspec.ValidationError:  # no properties; or invalid, and then compiling it raises the error
        return text.decode()
    except RecursionError:
        raise InvalidRequest("tools: a function's parameters are nested too deeply", param="tools") from None
    if not MORE_PROPERTIES.isdisjoint(schema) or not outline.properties.keys() >= set(outline.required):
        return text.decode()
    return msgspec.json.encode({**schema, "additionalProperties": False}).decode()


def template_extras(chat: Chat, chat_format: ChatFormat | None, spec: ModelSpec) -> tuple[TemplateExtras, list[str]]:
    """The template's variables beside the messages, and warnings. Raises `InvalidRequest` with the field's name."""
    warnings: list[str] = []
    known = frozenset[str]() if chat_format is None else chat_format.capabilities.variables
    for name, value in chat.variables.items():
        if spec.force_chat_template_kwargs and spec.chat_template_kwargs.get(name, value) != value:
            raise InvalidRequest(
                f"chat_template_kwargs: the server sets {name[:64]!r}, which no request may change",
                param="chat_template_kwargs",
            )
        if name not in known and len(warnings) < MAX_REPORTED_FIELDS:
            warnings.append(f"chat_template_kwargs: the model's template does not read {name[:64]!r}")
    hinted: dict[str, Any] = {}
    hint = chat.reasoning_hint
    if hint is not None:
        hinted = {name: hint.is_on for name in THINKING_SWITCHES if name in known}
        if hint.effort is not None and "reasoning_effort" in known:
            hinted["reasoning_effort"] = hint.effort
        elif hint.effort is not None and hint.effort not in NO_REASONING_EFFORTS:
            warnings.append(f"{hint.effort_field} is not obeyed: the model's template takes none")
    variables: dict[str, Any] = {**hinted, **spec.chat_template_kwargs, **chat.variables}
    effort = chat.reasoning_effort
    if effort is not None:
        switch = next((name for name in THINKING_SWITCHES if name in known), None)
        if "reasoning_effort" in known:
            variables["reasoning_effort"] = effort
        elif switch is not None:
            variables[switch] = effort not in NO_REASONING_EFFORTS
        elif effort not in ("none", "medium"):
            raise not_supported("reasoning_effort", f": the model's template takes none, got {effort!r}")
    tools = [tool.for_template() for tool in chat.tools]
    return TemplateExtras(tools=tools, documents=chat.documents, variables=variables), warnings
