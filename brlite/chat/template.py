"""A model's chat template. It is compiled and run in a child process, which it can neither hang nor exhaust.

The template comes from the model's or the operator's files, never from a request. Control tokens that a message spells
out stay words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from brlite.chat.control_tokens import ControlTokens
from brlite.errors import InvalidRequest, ModelError
from brlite.files.quoting import one_line
from brlite.files.text_file import TextError
from brlite.files.text_file import read_text as read_text_file
from brlite.sandbox.child_process import ChildFailed, ChildLimits, ChildProcess

_PACKAGES = ("jinja2", "markupsafe")
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_ -]{0,63}")  # what a template may make a control token of


class ChatTemplate:
    """Renders chats. `special_tokens` are texts it may name, such as `bos_token`; those a model lacks are absent.

    `close` ends its process; dropping the template does so too.
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
        """Raises `ModelError`, naming `source`, for a template that does not compile within the limits."""
        self.text: str | None = template
        self._control_tokens = control_tokens or ControlTokens({})
        self._knows_developer = "developer" in template
        self._child = ChildProcess(_PACKAGES, limits or ChildLimits())
        setup = {
            "template": template,
            "controls": self._control_tokens.texts,
            "variables": dict(special_tokens),
        }
        try:
            answer = self._child.set_up(setup)
        except ChildFailed as error:
            answer = {"error": str(error)}
        if "error" in answer:
            self._child.close()
            raise ModelError(f"{source}: the chat template is broken: {one_line(answer['error'])}")
        self._unsaid_roles = frozenset(answer["unsaid_roles"])

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """The chat as text. Raises `InvalidRequest` if the template refuses it, fails, or takes too much."""
        plain = [{**message, "role": self._role(message.get("role"))} for message in messages]
        try:
            answer = self._child.call({"messages": plain, "add_generation_prompt": add_generation_prompt})
        except (ChildFailed, TypeError, ValueError, RecursionError) as error:
            raise template_refusal(str(error)) from None
        if "error" in answer:
            raise template_refusal(one_line(answer["error"]))
        return self._control_tokens.find(answer["text"], answer["mark"])

    def close(self) -> None:
        self._child.close()

    def _role(self, role: object) -> str:
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise template_refusal("a role must be a word of at most 64 letters and digits")
        if role == "developer" and not self._knows_developer:
            role = "system"
        if role in self._unsaid_roles:
            raise template_refusal(f"the model's template leaves out messages of the role {role}")
        return role


def template_refusal(reason: str) -> InvalidRequest:
    """The error for a chat that a model's format cannot say."""
    return InvalidRequest(
        f"Error in applying chat template from request: {reason}; /v1/completions takes a prompt without a template",
        param="messages",
    )


def read_template(path: Path) -> str:
    """The text of the operator's template file."""
    try:
        return read_text_file(path)
    except TextError as error:
        raise ModelError(f"chat template {path}: {error}") from None
