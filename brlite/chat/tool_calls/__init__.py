"""The formats of models' tool calls, one file each: the grammar of a call and an incremental parser.

A format is independent of engine and HTTP. First files: `parser.py`, then `hermes.py`.
"""

from __future__ import annotations

from brlite.chat.tool_calls.chatglm import ChatGlmParser
from brlite.chat.tool_calls.deepseek import DeepSeekParser, DeepSeekV31Parser
from brlite.chat.tool_calls.glm4_moe import Glm4MoeParser
from brlite.chat.tool_calls.harmony import HarmonyParser
from brlite.chat.tool_calls.hermes import HermesParser
from brlite.chat.tool_calls.kimi import KimiParser
from brlite.chat.tool_calls.llama3_json import Llama3JsonParser
from brlite.chat.tool_calls.mistral import GraniteParser, MistralArgsParser, MistralParser
from brlite.chat.tool_calls.parser import CallGrammar, ToolCallParser
from brlite.chat.tool_calls.pythonic import Lfm2Parser, PythonicParser
from brlite.chat.tool_calls.qwen3_coder import Qwen3CoderParser

__all__ = ["PARSERS", "CallGrammar", "ToolCallParser", "find_parser"]

PARSERS: dict[str, type[ToolCallParser]] = {
    parser.name: parser
    for parser in (
        HermesParser,
        Llama3JsonParser,
        PythonicParser,
        Lfm2Parser,
        MistralParser,
        MistralArgsParser,
        GraniteParser,
        ChatGlmParser,
        DeepSeekParser,
        DeepSeekV31Parser,
        Qwen3CoderParser,
        Glm4MoeParser,
        KimiParser,
        HarmonyParser,
    )
}

# The first row whose texts are all in a template gives the template's format.
_SIGNS: tuple[tuple[tuple[str, ...], type[ToolCallParser]], ...] = (
    (("<|channel|>", "<|message|>"), HarmonyParser),
    (("<arg_key>",), Glm4MoeParser),
    (("<function=", "<parameter="), Qwen3CoderParser),
    (("<｜tool▁calls▁begin｜>", "```json"), DeepSeekParser),
    (("<｜tool▁calls▁begin｜>",), DeepSeekV31Parser),
    (("<|tool_calls_section_begin|>",), KimiParser),
    (("[TOOL_CALLS]", "[ARGS]"), MistralArgsParser),
    (("[TOOL_CALLS]",), MistralParser),
    (("<tool_call>",), HermesParser),
    (("<|tool_call|>", "JSON list"), GraniteParser),
    (("<|tool_call_start|>",), Lfm2Parser),
    (("List of tools: ", "<|im_start|>"), Lfm2Parser),
    (("<|python_start|>",), PythonicParser),
    (("[func_name1(",), PythonicParser),
    (("<|python_tag|>",), Llama3JsonParser),
    (('"parameters": dictionary of argument name',), Llama3JsonParser),
    (("<|observation|>",), ChatGlmParser),
)


def find_parser(template: str) -> type[ToolCallParser] | None:
    """The parser for the call format of a chat template; None if the format is unknown."""
    return next((parser for signs, parser in _SIGNS if all(sign in template for sign in signs)), None)
