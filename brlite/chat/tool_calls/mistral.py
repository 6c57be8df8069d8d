"""Mistral: `[TOOL_CALLS]` and a JSON list of calls; in newer models `[TOOL_CALLS]f[ARGS]{...}` for each call.

Granite 3 writes the same list after `<|tool_call|>`.
"""

from __future__ import annotations

import json

from brlite.chat.tool_calls.parser import CallGrammar, ToolCallParser
from brlite.chat.tool_calls.source import BrokenCall, Step
from brlite.chat.tools import Tool

MARK, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
GRANITE_MARK = "<|tool_call|>"


class MistralParser(ToolCallParser):
    """The format of the vocabularies up to version 7 (Mistral 7B v0.3, Nemo, Large 2407)."""

    name = "mistral"
    marks = (MARK, ARGS, CALL_ID)
    call_mark = MARK
    has_short_ids = True

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar:
        return _list_grammar(MARK, tool)

    def read_calls(self) -> Step[None]:
        source = self._source
        yield from source.spaces()
        if (yield from source.peek()) == "[":
            yield from self._json_calls()
            return
        if (yield from source.peek()) == "{":
            yield from self._json_call()
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

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar:
        return CallGrammar(trigger=MARK, begin=f"{MARK}{tool.name}{ARGS}", end="")


class GraniteParser(ToolCallParser):
    """The format of Granite 3."""

    name = "granite"
    marks = (GRANITE_MARK,)
    call_mark = GRANITE_MARK

    @classmethod
    def grammar(cls, tool: Tool) -> CallGrammar:
        return _list_grammar(GRANITE_MARK, tool)

    def read_calls(self) -> Step[None]:
        yield from self._source.spaces()
        yield from self._json_calls()


def _list_grammar(mark: str, tool: Tool) -> CallGrammar:
    begin = f'{{"name": {json.dumps(tool.name)}, "arguments": '
    return CallGrammar(trigger=mark, opening=f"{mark}[", begin=begin, end="}", separator=", ", closing="]")
