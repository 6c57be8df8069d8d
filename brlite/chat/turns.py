"""Converts a conversation from OpenAI's shape to the shape that one chat template takes. Renders nothing.

Templates take different shapes: parts or strings as content, arguments as mappings or strings, an empty content or
none beside calls, reasoning under one of several keys. If a template does not support tools, they are written as text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import product
from typing import Any, Literal

import msgspec

from brlite.chat.tool_calls import PARSERS
from brlite.errors import InvalidRequest

Turn = Mapping[str, Any]

MAX_ROLE = 64  # characters
_ROLE = re.compile(rf"[A-Za-z][A-Za-z0-9_ -]{{0,{MAX_ROLE - 1}}}")  # strict: templates build control tokens of roles
_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_TOOL_NAME = re.compile(r"[\w.-]+")  # others could have the text of a control token
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

# Template variables that no request may set: the server's own, and those that would replace the template.
RESERVED = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"),
        *("raise_exception", "strftime_now", "tokenize", "return_dict", "bos_token", "eos_token"),
    }
)

# The text of Qwen2.5's and Hermes' templates, for models whose template does not support tools.
TOOLS_IN_WORDS = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


class TemplateCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """The capabilities of a template, found by trial renderings (`template_worker.py`).

    `roles` has for each role: True if it is rendered, False if it is left out without an error, None if it is refused.
    The key "" stands for all roles without an entry, except "user"; "later system" for a system message that is not the
    first. `variables` are the names that the template reads. `takes_empty_content` is False if a turn with calls must
    have no `content`. With `marks_content` the model writes marks around content too, as in gpt-oss' harmony.
    `reasoning_key` is the key of an assistant turn that the template reads its reasoning from. `tools_variable` is the
    template's name for its argument of tools. `call_format` is the format of calls that are written as text. Without
    `knows_calls` the template gets tools, but has its calls in a format that no parser reads.
    """

    roles: Mapping[str, bool | None] = msgspec.field(default_factory=lambda: {"system": True})
    takes_strings: bool = True
    takes_parts: bool = False
    tools_in: Literal["argument", "system message", "system message, as text"] | None = None
    tools_variable: str = "tools"
    call_format: str = "hermes"
    knows_calls: bool = True
    variables: frozenset[str] = frozenset()
    says_calls: bool = False
    says_results: bool = False
    takes_mappings: bool = True
    takes_empty_content: bool = True
    needs_short_ids: bool = False
    knows_developer: bool = False
    reasoning_key: str | None = None
    reasoning_marks: tuple[str, str] | None = None
    reasoning_separator: str = "\n\n"  # between the end mark and the content
    marks_content: bool = False

    @property
    def knows_tools(self) -> bool:
        """Whether the template renders lists of tools. Otherwise tools, calls and results are written as text.

        If it does, calls are written as text without `says_calls`, and results without `says_results`.
        """
        return self.tools_in is not None


class TemplateExtras(msgspec.Struct, frozen=True, kw_only=True):
    """A template's input besides the turns. `tools` are in the shape of OpenAI's chat API.

    `variables` are `chat_template_kwargs`.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    documents: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = {}


NO_EXTRAS = TemplateExtras()


def prepare_turns(
    turns: Sequence[Turn], extras: TemplateExtras, can: TemplateCapabilities, *, seal: str = ""
) -> list[dict[str, Any]]:
    """The turns in the shape that a template with these capabilities takes. Raises `InvalidRequest` for turns that it
    does not support.

    In calls that are written as text, `seal` follows the first character of each of the format's marks. A seal that no
    client can guess tells these marks from the same texts in a message.
    """
    own = RESERVED | {can.tools_variable} if extras.tools else RESERVED
    if extras.variables and (reserved := own.intersection(extras.variables)):
        raise InvalidRequest(f"chat_template_kwargs must not set {min(reserved)!r}", param="chat_template_kwargs")
    if extras.documents and "documents" not in can.variables:
        raise InvalidRequest("documents: the model's chat template does not take documents", param="documents")
    tools = extras.tools
    names = {
        call.get("id"): call["function"]["name"]
        for turn in turns
        for call in turn.get("tool_calls") or ()
        if isinstance(call, Mapping)
    }
    uses_tools = any(turn.get("tool_calls") or turn.get("role") in ("tool", "function") for turn in turns)
    if uses_tools and not (can.knows_tools and can.says_calls and can.says_results):
        turns = _calls_in_words(turns, can, seal)
    if tools and not can.knows_tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        turns = _with_system(turns, can, text=TOOLS_IN_WORDS.format(tools=listed))
    elif tools and can.tools_in != "argument":
        functions = [tool["function"] for tool in tools]
        is_text = can.tools_in == "system message, as text"
        turns = _with_system(turns, can, tools=json.dumps(functions, ensure_ascii=False) if is_text else functions)
    return [_prepared(turn, names, can, is_first=index == 0) for index, turn in enumerate(turns)]


def template_refusal(reason: str) -> InvalidRequest:
    """The error for a chat that a model's template does not support."""
    return InvalidRequest(
        f"Error in applying chat template from request: {reason}; /v1/completions takes a prompt without a template",
        param="messages",
    )


def _prepared(
    turn: Turn, names: Mapping[str | None, str], can: TemplateCapabilities, *, is_first: bool
) -> dict[str, Any]:
    calls = turn.get("tool_calls") or ()
    content = turn.get("content")
    prepared = {key: value for key, value in turn.items() if key not in ("tool_calls", "reasoning_content")}
    role = turn.get("role")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise template_refusal(f"a role must be a word of at most {MAX_ROLE} letters and digits")
    if role == "developer" and not can.knows_developer:
        role = "system"
    is_result = role == "tool" and turn.get("tool_call_id") in names and can.says_results
    if role != "user" and can.roles.get(role, can.roles.get("")) is False and not is_result:
        raise template_refusal(f"the model's template leaves out messages of the role {role}")
    if role == "system" and not is_first and can.roles.get("later system") is False:
        raise template_refusal("the model's template leaves out a system message that is not the first")
    prepared["role"] = role
    if isinstance(content, list) and not can.takes_parts:
        prepared["content"] = joined_text(content)
    elif isinstance(content, str) and not can.takes_strings:
        prepared["content"] = [{"type": "text", "text": content}]
    elif content is None:
        prepared["content"] = ""
    if calls:
        prepared["tool_calls"] = [_prepared_call(call, can) for call in calls]
        if not content and not can.takes_empty_content:
            del prepared["content"]
    if turn.get("role") == "tool" and "tool_call_id" in turn:
        prepared.setdefault("name", names.get(turn["tool_call_id"], ""))
        if can.needs_short_ids:
            prepared["tool_call_id"] = short_id(turn["tool_call_id"])
    reasoning = turn.get("reasoning_content")
    if reasoning and can.reasoning_key:
        prepared[can.reasoning_key] = reasoning
    elif reasoning and can.reasoning_marks and isinstance(prepared.get("content"), str):
        start, end = can.reasoning_marks
        prepared["content"] = f"{start}\n{reasoning}\n{end}{can.reasoning_separator}{prepared['content']}"
    return prepared


def _prepared_call(call: Mapping[str, Any], can: TemplateCapabilities) -> dict[str, Any]:
    function = call["function"]
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str) and can.takes_mappings:
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            parsed = None  # a call that was cut off; the template gets the text
        arguments = parsed if isinstance(parsed, dict) else arguments
    elif not isinstance(arguments, str) and not can.takes_mappings:
        arguments = json.dumps(arguments, ensure_ascii=False)
    prepared = {**call, "type": "function", "function": {**function, "arguments": arguments}}
    if can.needs_short_ids:
        prepared["id"] = short_id(str(call.get("id", "")))
    return prepared


def short_id(call_id: str) -> str:
    """Nine letters and digits, as Mistral's templates require. Equal ids give equal results."""
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    number = int.from_bytes(blake2b(call_id.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")
    return "".join(_BASE62[number // 62**index % 62] for index in range(9))


def joined_text(content: str | Sequence[Any] | None) -> str:
    """The text of a turn's content. Raises `InvalidRequest` for a part that is not text."""
    if content is None or isinstance(content, str):
        return content or ""
    texts: list[str] = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            raise template_refusal("a part of a message's content must be a text")
        texts.append(text)
    return "".join(texts)


def _calls_in_words(turns: Sequence[Turn], can: TemplateCapabilities, seal: str) -> list[dict[str, Any]]:
    """Turns with the calls and results that the template does not render written as text.

    Calls are in the content, in the format of the model. Results are in `<tool_response>` in a user turn, together with
    the user's next text.
    """
    words: list[dict[str, Any]] = []
    for turn in turns:
        plain = dict(turn)
        calls = turn.get("tool_calls") or ()
        is_result = turn.get("role") in ("tool", "function") and not (can.knows_tools and can.says_results)
        if calls and not (can.knows_tools and can.says_calls):
            del plain["tool_calls"]
            texts = [joined_text(turn.get("content")), _written_calls(calls, can.call_format, seal)]
            words.append({**plain, "content": "\n".join(filter(None, texts))})
        elif is_result:
            text = f"<tool_response>\n{joined_text(turn.get('content'))}\n</tool_response>"
            if words and words[-1].get("is_result"):
                words[-1]["content"] += "\n" + text
            else:
                words.append({"role": "user", "content": text, "is_result": True})
        elif turn.get("role") == "user" and words and words[-1].get("is_result"):
            words[-1] = {**plain, "content": f"{words[-1]['content']}\n{joined_text(turn.get('content'))}"}
        else:
            words.append(plain)
    for word in words:
        word.pop("is_result", None)
    return words


def _written_calls(calls: Sequence[Mapping[str, Any]], call_format: str, seal: str) -> str:
    """The calls as the model writes them, with the seal in each mark of the format; in Hermes' format if its own cannot
    express them."""
    given: list[tuple[str, str]] = []
    for call in calls:
        arguments = call["function"].get("arguments") or "{}"
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        given.append((call["function"]["name"], arguments))
    parser = PARSERS[call_format]
    pieces = parser.write(given) or PARSERS["hermes"].write(given) or []
    if seal and all(_TOOL_NAME.fullmatch(name) for name, _ in given):
        for mark, index in product(parser.marks, range(0, len(pieces), 2)):
            pieces[index] = pieces[index].replace(mark, f"{mark[0]}{seal}{mark[1:]}")
    return "".join(pieces)


def _with_system(
    turns: Sequence[Turn], can: TemplateCapabilities, *, text: str = "", **more: object
) -> list[dict[str, Any]]:
    """The turns with `text`, or the keys `more`, added to their first system message. Without one, it is inserted.

    If the template does not support system messages, the text goes before the first user message.
    """
    first: Turn = turns[0] if turns else {}
    role = "user"
    if can.roles.get("system"):
        role = "system"
        if first.get("role") not in ("system", "developer"):
            return [{"role": "system", "content": text, **more}, *map(dict, turns)]
    for index, turn in enumerate(turns):
        if turn.get("role") == role or (role == "system" and index == 0):
            texts = (
                (joined_text(turn.get("content")), text)
                if role == "system"
                else (text, joined_text(turn.get("content")))
            )
            changed = {**turn, "content": "\n\n".join(filter(None, texts)), **more}
            return [*map(dict, turns[:index]), changed, *map(dict, turns[index + 1 :])]
    raise template_refusal("it knows no tools, and there is no user message to describe them in")
