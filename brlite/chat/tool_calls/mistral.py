"""Mistral: `[TOOL_CALLS]` and a JSON list of calls; in newer models `[TOOL_CALLS]f[ARGS]{...}` for each call."""

from __future__ import annotations

from brlite.chat.tool_calls.json_calls import JsonParser
from brlite.chat.tool_calls.parser import CallGrammar
from brlite.chat.tool_calls.source import BrokenCall, Step
from brlite.chat.tools import Tool

MARK, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


class MistralParser(JsonParser):
    """The format of the vocabularies up to version 7 (Mistral 7B v0.3, Nemo, Large 2407). Both formats are read."""

    name = "mistral"
    marks = (MARK, ARGS, CALL_ID)
    call_mark = MARK
    has_short_ids = True

    def read_calls(self) -> Step[None]:
        source = self._source
        yield from source.spaces()
        if (yield from source.peek()) in ("[", "{"):
            yield from super().read_calls()
            return
        # `f[ARGS]{...}`, `f[CALL_ID]id[ARGS]{...}` or `f{...}`
        pieces: list[str] = []
        mark = yield from source.until((ARGS, CALL_ID, "{"), pieces.append)
        if not mark:
            raise BrokenCall("its arguments are missing")
        self._begin("".join(pieces).strip())
        if mark == CALL_ID:
            yield from source.text_until(ARGS)
        if mark == "{":
            source.at -= 1
        yield from source.spaces()
        yield from self._json_arguments()
        self._end()


class MistralArgsParser(MistralParser):
    """The format of the vocabularies from version 11 on (Mistral Small 3.2, Magistral, Devstral)."""

    name = "mistral_args"
    brackets, separator, marks_each = ("", ""), "", True

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar:
        return cls.enclosed(f"{tool.name}{ARGS}", "")
