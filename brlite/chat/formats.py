"""Chat formats of models that were published with code instead of a template: the places of their control tokens.

Control tokens are token ids, so their text inside a message stays plain text. This is brlite's code and runs
in-process.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from brlite.chat.control_tokens import MarkedText
from brlite.chat.turns import NO_EXTRAS, TemplateCapabilities, TemplateExtras, prepare_turns, template_refusal

Messages = Sequence[Mapping[str, Any]]

# ChatGLM3's control tokens, in the order of their ids, which follow the ids of its SentencePiece pieces.
CHATGLM3_TOKENS = (
    *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)
CHATGLM2_TOKENS = CHATGLM3_TOKENS[:5]  # the same without roles
CHATGLM3_PREFIX = ("[gMASK]", "sop")
CHATGLM3_ENDS = ("<|user|>", "<|observation|>")
CHATGLM3_ROLES = {
    "system": "<|system|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
    "observation": "<|observation|>",
    "tool": "<|observation|>",  # OpenAI's name of this role
}


class ChatFormat(Protocol):
    """Turns a chat into text. `render` raises `InvalidRequest` for a chat that the format cannot express.

    `text` is the Jinja template, if any. `tool_parser` names the format of tool calls; None: find it from `text`.
    """

    text: str | None = None
    capabilities: TemplateCapabilities = TemplateCapabilities()
    tool_parser: str | None = None

    def render(self, messages: Messages, *, add_generation_prompt: bool, extras: TemplateExtras = NO_EXTRAS) -> str: ...

    def close(self) -> None:
        """Release the resources of rendering. Built-in formats have none."""
        return


class Baichuan2Format(ChatFormat):
    """The system message unchanged, then each message after the token of its role. No token ends a message."""

    def __init__(self, *, user_token_id: int, assistant_token_id: int, names: Mapping[int, str]) -> None:
        self._tokens = {"user": user_token_id, "assistant": assistant_token_id}
        self._names = names

    def render(
        self, messages: Messages, *, add_generation_prompt: bool, extras: TemplateExtras = NO_EXTRAS
    ) -> MarkedText:
        messages = prepare_turns(messages, extras, self.capabilities)
        parts: list[str | int] = []
        for index, message in enumerate(messages):
            role = message.get("role")
            if role == "system" and index > 0:
                raise template_refusal("a system message must be the first")
            parts += [] if role == "system" else [_token(self._tokens, role)]
            parts.append(_text(message, "content"))
        if add_generation_prompt and messages and messages[-1].get("role") != "assistant":
            parts.append(self._tokens["assistant"])
        return MarkedText(parts, self._names)


class ChatGLM3Format(ChatFormat):
    """`[gMASK]sop`, then for each message its role's token, metadata (a tool's name), a new line and the content."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._names = {token_id: text for text, token_id in ids.items()}
        self._prefix = [ids[text] for text in CHATGLM3_PREFIX]
        self._tokens = {role: ids[text] for role, text in CHATGLM3_ROLES.items()}

    capabilities = TemplateCapabilities(
        roles={"system": True, "tool": True}, tools_in="system message", says_calls=True, says_results=True
    )
    tool_parser = "chatglm"

    def render(
        self, messages: Messages, *, add_generation_prompt: bool, extras: TemplateExtras = NO_EXTRAS
    ) -> MarkedText:
        parts: list[str | int] = [*self._prefix]
        for message in prepare_turns(messages, extras, self.capabilities):
            role = _token(self._tokens, message.get("role"))
            calls = message.get("tool_calls") or ()
            if _text(message, "content") or not calls:
                content = _text(message, "content")
                if message.get("role") == "system" and message.get("tools"):
                    content += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
                parts += [role, _text(message, "metadata") + "\n", content]
            for call in calls:  # as the model writes calls: Python keyword arguments
                given = call["function"]["arguments"]
                given = f"**{given}" if isinstance(given, str) else ", ".join(f"{k}={v!r}" for k, v in given.items())
                parts += [role, call["function"]["name"] + "\n", f"```python\ntool_call({given})\n```"]
        if add_generation_prompt:
            parts.append(self._tokens["assistant"])
        return MarkedText(parts, self._names)


class ChatGLM2Format(ChatFormat):
    """`[gMASK]sop`, then rounds of a question and an answer, marked by plain text: there are no tokens for roles."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._names = {token_id: text for text, token_id in ids.items()}
        self._prefix = [ids[text] for text in CHATGLM3_PREFIX]

    capabilities = TemplateCapabilities(roles={"system": None})

    def render(
        self, messages: Messages, *, add_generation_prompt: bool, extras: TemplateExtras = NO_EXTRAS
    ) -> MarkedText:
        messages = prepare_turns(messages, extras, self.capabilities)
        text = ""
        for index, message in enumerate(messages):
            if message.get("role") != ("user", "assistant")[index % 2]:
                raise template_refusal("its rounds are a user's message and the assistant's, in turns")
            is_question = index % 2 == 0
            text += f"[Round {index // 2 + 1}]\n\n问：" if is_question else "\n\n答："
            text += _text(message, "content") + ("" if is_question else "\n\n")
        return MarkedText([*self._prefix, text + ("\n\n答：" if len(messages) % 2 else "")], self._names)


def _token(tokens: Mapping[str, int], role: object) -> int:
    if role not in tokens:
        raise template_refusal(f"role {str(role)[:80]!r} has no token; {', '.join(tokens)} have")
    return tokens[str(role)]


def _text(message: Mapping[str, Any], key: str) -> str:
    """The string under `key`, or an empty one."""
    value = message.get(key)
    if value is not None and not isinstance(value, str):
        raise template_refusal(f"{key} must be a string")
    return value or ""
