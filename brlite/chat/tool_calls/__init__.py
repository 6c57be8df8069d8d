"""The formats of models' tool calls: the grammar of a call and an incremental parser, side by side.

Formats of the same shape stand in one file and differ in their texts. A format is independent of engine and HTTP. First
files: `parser.py`, then `json_calls.py`.
"""

from __future__ import annotations

from brlite.chat.tool_calls import chatglm, harmony, json_calls, mistral, named_calls, pythonic, tagged_calls
from brlite.chat.tool_calls.parser import CallGrammar, ToolCallParser

__all__ = ["PARSERS", "CallGrammar", "ToolCallParser", "find_parser"]

PARSERS: dict[str, type[ToolCallParser]] = {
    parser.name: parser
    for parser in (
        json_calls.HermesParser,
        json_calls.Llama3JsonParser,
        json_calls.XLamParser,
        json_calls.GraniteParser,
        json_calls.Phi4MiniParser,
        json_calls.FunctoolsParser,
        json_calls.NemotronParser,
        json_calls.ToolCallsParser,
        json_calls.InternLmParser,
        json_calls.CommandRParser,
        mistral.MistralParser,
        mistral.MistralArgsParser,
        named_calls.FunctionaryParser,
        named_calls.DeepSeekParser,
        named_calls.DeepSeekV31Parser,
        named_calls.KimiParser,
        tagged_calls.Qwen3CoderParser,
        tagged_calls.SeedOssParser,
        tagged_calls.MiniMaxM2Parser,
        tagged_calls.Glm4MoeParser,
        pythonic.PythonicParser,
        pythonic.Lfm2Parser,
        pythonic.Olmo3Parser,
        chatglm.ChatGlmParser,
        chatglm.Functionary32Parser,
        harmony.HarmonyParser,
    )
}

# The first row whose texts are all in a template gives the template's format.
_SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "<|message|>"), "harmony"),
    (("<arg_key>",), "glm4_moe"),
    (("<seed:tool_call>",), "seed_oss"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<function=", "<parameter="), "qwen3_coder"),
    (("<function=example_function_name>{",), "functionary"),
    ((">>>${recipient}",), "functionary_32"),
    (("<｜tool▁calls▁begin｜>", "```json"), "deepseek"),
    (("<｜tool▁calls▁begin｜>",), "deepseek_v31"),
    (("<|tool_calls_section_begin|>",), "kimi"),
    (("[TOOL_CALLS]", "[ARGS]"), "mistral_args"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<tool_call>",), "hermes"),
    (("<TOOLCALL>",), "nemotron"),
    (("<tool_calls>",), "tool_calls"),
    (("<|START_ACTION|>",), "command"),
    (("<|action_start|>",), "internlm"),
    (("<|plugin|>",), "internlm"),
    (("functools[",), "functools"),
    (("<|tool_call|>", "<|/tool_call|>"), "phi4_mini"),
    (("<|tool|>", "<|/tool|>"), "phi4_mini"),
    (("<|tool_call|>", "JSON list"), "granite"),
    (("<function_calls>", "<functions>"), "olmo3"),
    (("<|tool_call_start|>",), "lfm2"),
    (("List of tools: ", "<|im_start|>"), "lfm2"),
    (("<|python_start|>",), "pythonic"),
    (("[func_name1(",), "pythonic"),
    (("single JSON array", "tool_call_name"), "xlam"),
    (("<|python_tag|>",), "llama3_json"),
    (('"parameters": dictionary of argument name',), "llama3_json"),
    (("<|observation|>",), "chatglm"),
)


def find_parser(template: str) -> type[ToolCallParser] | None:
    """The parser for the call format of a chat template; None if the format is unknown."""
    return next((PARSERS[name] for signs, name in _SIGNS if all(sign in template for sign in signs)), None)
