"""A model's chat template. It is compiled and run in a child process, within limits of time and memory.

The template comes from the model's or the operator's files, never from a request. The text of a control token inside a
message or a tool stays plain text.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from brlite.chat.control_tokens import ControlTokens
from brlite.chat.reasoning import find_reasoning_key, find_reasoning_marks
from brlite.chat.tool_calls import find_parser
from brlite.chat.turns import NO_EXTRAS, TemplateCapabilities, TemplateExtras, prepare_turns, template_refusal
from brlite.errors import ModelError
from brlite.files.quoting import one_line
from brlite.files.text_file import TextError
from brlite.files.text_file import read_text as read_text_file
from brlite.process.sandbox import ChildLimits, ChildProcess

_WORKER = Path(__file__).with_name("template_worker.py")
_PACKAGES = ("jinja2", "markupsafe")
_CUTS_AT_END_MARK = re.compile(r"""split\(\s*(['"])</think>\1[^)]{0,99}\)\s{0,99}\[(-1|1)\](?!\s*[.|])""")


class ChatTemplate:
    """Renders chats. `special_tokens` are the template's variables such as `bos_token`, without those the model lacks.

    The process ends with `close`, or when the template is garbage-collected.
    """

    def __init__(
        self,
        template: str,
        *,
        source: str,
        special_tokens: Mapping[str, str],
        control_tokens: ControlTokens | None = None,
        limits: ChildLimits | None = None,
    ) -> None:
        """Raises `ModelError`, naming `source`, if the template does not compile within the limits."""
        self.text: str | None = template
        self.tool_parser: str | None = None
        self._control_tokens = control_tokens or ControlTokens({})
        self._child = ChildProcess(_WORKER, _PACKAGES, limits or ChildLimits())
        setup = {
            "template": template,
            "controls": self._control_tokens.pattern,
            "control_texts": self._control_tokens.texts,
            "variables": dict(special_tokens),
        }
        answer = self._child.set_up(setup)
        if "error" in answer:
            self._child.close()
            raise ModelError(f"{source}: the chat template is broken: {one_line(answer['error'])}")
        parser = find_parser(template)
        self.capabilities = TemplateCapabilities(
            **{**answer, "variables": frozenset(answer["variables"])},
            call_format=parser.name if parser is not None and answer["tools_in"] else "hermes",
            knows_calls=parser is not None or not answer["tools_in"],
            knows_developer="developer" in template and bool(answer["roles"]["developer"]),
            reasoning_key=find_reasoning_key(template),
            reasoning_marks=find_reasoning_marks(template),
            # DeepSeek's templates drop the text up to the end mark, and keep white space after it.
            reasoning_separator="" if _CUTS_AT_END_MARK.search(template) else "\n\n",
            marks_content="<|channel|>" in template and "<|message|>" in template,
        )

    def render(
        self, turns: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, extras: TemplateExtras = NO_EXTRAS
    ) -> str:
        """The chat as text. Raises `InvalidRequest` if the template refuses it, fails, or exceeds its limits."""
        # Calls that are written as text have marks, which may be control tokens. With the seal behind its first
        # character a mark is not taken for a client's text. The seal is removed from the result.
        seal = "" if self.capabilities.knows_tools and self.capabilities.says_calls else f"{secrets.randbits(64):020}"
        turns = prepare_turns(turns, extras, self.capabilities, seal=seal)
        variables: dict[str, Any] = dict(extras.variables)
        if extras.tools and self.capabilities.tools_in == "argument" and self.capabilities.knows_tools:
            variables[self.capabilities.tools_variable] = list(extras.tools)
        if extras.documents:
            variables["documents"] = list(extras.documents)
        message = {
            "messages": turns,
            "add_generation_prompt": add_generation_prompt,
            "extras": variables,
        }
        try:
            answer = self._child.call(message)
        except (TypeError, ValueError, RecursionError) as error:
            raise template_refusal(str(error)) from None
        if "error" in answer:
            raise template_refusal(one_line(answer["error"]))
        return self._control_tokens.find(answer["text"].replace(seal, "") if seal else answer["text"], answer["mark"])

    def close(self) -> None:
        self._child.close()


class NamedTemplates:
    """A model's template for plain chats and the one for chats with tools, chosen as in transformers.

    `text` and `capabilities` are the plain template's, but `variables` are those of both, and `tool_parser` and
    `knows_calls` are those of the template for tools.
    """

    def __init__(self, default: ChatTemplate, tool_use: ChatTemplate) -> None:
        self._default = default
        self._tool_use = tool_use
        self.text = default.text
        parser = find_parser(tool_use.text or "")
        self.tool_parser = None if parser is None else parser.name
        self.capabilities = msgspec.structs.replace(
            default.capabilities,
            variables=default.capabilities.variables | tool_use.capabilities.variables,
            knows_calls=tool_use.capabilities.knows_calls,
        )

    def render(
        self, turns: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, extras: TemplateExtras = NO_EXTRAS
    ) -> str:
        """As `ChatTemplate.render`."""
        template = self._tool_use if extras.tools else self._default
        return template.render(turns, add_generation_prompt=add_generation_prompt, extras=extras)

    def close(self) -> None:
        self._default.close()
        self._tool_use.close()


def read_template(path: Path) -> str:
    """The text of the operator's template file."""
    try:
        return read_text_file(path)
    except TextError as error:
        raise ModelError(f"chat template {path}: {error}") from None
