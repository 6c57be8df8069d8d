"""Replies of models in each format of calls, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from brlite.chat.tool_calls.parser import ToolCallParser
from brlite.chat.tools import ReplyEvent, Tool, ToolCallDelta, collect


def function(name: str, schema: object, description: str | None = None) -> Tool:
    return Tool(name=name, description=description, parameters=msgspec.Raw(msgspec.json.encode(schema)))


TOOLS = (
    function(
        "get_weather",
        {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "zip": {"type": "string"}},
        },
        description="The weather of a city.",
    ),
    Tool(name="now"),
)
WEATHER, NOW = ("get_weather", {"city": 'Paris, "FR" 水', "days": 2, "zip": "12"}), ("now", {})
_JSON = '{"city": "Paris, \\"FR\\" 水", "days": 2, "zip": "12"}'
_FENCED = f"```json\n{_JSON}\n```"


class ReplyCase(NamedTuple):
    """A reply, its content, and its calls as (name, arguments)."""

    parser: str
    text: str
    content: str
    calls: tuple[tuple[str, dict[str, object]], ...]


CASES = (
    ReplyCase(
        "hermes",
        f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {_JSON}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "Let me see.",
        (WEATHER, NOW),
    ),
    ReplyCase(
        "hermes",
        f'<tool_call>{{"arguments": {_JSON}, "id": [1], "name": "get_weather"}}</tool_call>',
        "",
        (WEATHER,),
    ),
    ReplyCase("hermes", '<tool_call>\n{"name": "now"}', "", (NOW,)),
    ReplyCase("hermes", '<tool_call>{"name": "now", "arguments": "{}"}</tool_call>\nDone.', "Done.", (NOW,)),
    ReplyCase("hermes", "a <tool and a < b\n", "a <tool and a < b\n", ()),
    ReplyCase(
        "llama3_json",
        f'{{"name": "get_weather", "parameters": {_JSON}}}; {{"name": "now", "parameters": {{}}}}',
        "",
        (WEATHER, NOW),
    ),
    ReplyCase("llama3_json", f'<|python_tag|>{{"name": "get_weather", "parameters": {_JSON}}}', "", (WEATHER,)),
    ReplyCase("llama3_json", ' {"answer": 5}', ' {"answer": 5}', ()),
    ReplyCase(
        "pythonic",
        '[get_weather(city=\'Paris, "FR" \\u6c34\', days=2, zip="12"), now()]',
        "",
        (WEATHER, NOW),
    ),
    ReplyCase("pythonic", "<|python_start|>[now()]<|python_end|>", "", (NOW,)),
    ReplyCase("pythonic", "[1, 2] is a list", "[1, 2] is a list", ()),
    ReplyCase(
        "mistral",
        f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {_JSON}}}, {{"name": "now", "arguments": {{}}}}]',
        "",
        (WEATHER, NOW),
    ),
    ReplyCase(
        "mistral_args",
        f"I look.[TOOL_CALLS]get_weather[ARGS]{_JSON}[TOOL_CALLS]now[ARGS]{{}}",
        "I look.",
        (WEATHER, NOW),
    ),
    ReplyCase(
        "granite",
        f'Ok. <|tool_call|>[{{"name": "get_weather", "arguments": {_JSON}}}, {{"name": "now", "arguments": {{}}}}]',
        "Ok.",
        (WEATHER, NOW),
    ),
    ReplyCase("granite", '<|tool_call|> [{"arguments": {}, "name": "now"}]', "", (NOW,)),
    ReplyCase(
        "lfm2",
        "<|tool_call_start|>[get_weather(city='Paris, \"FR\" 水', days=2, zip='12'), now()]<|tool_call_end|>I look.",
        "I look.",
        (WEATHER, NOW),
    ),
    ReplyCase("lfm2", "[now()] is a list", "[now()] is a list", ()),
    ReplyCase("mistral_args", "[TOOL_CALLS]now[CALL_ID]a1b2c3d4e[ARGS]{}", "", (NOW,)),
    ReplyCase("chatglm", f"get_weather\n{_JSON}<|assistant|>now\n{{}}", "", (WEATHER, NOW)),
    ReplyCase(
        "chatglm",
        "get_weather\n ```python\ntool_call(city='Paris, \"FR\" 水', days=2, zip='12')\n```",
        "",
        (WEATHER,),
    ),
    ReplyCase("chatglm", "\n now and then", "\n now and then", ()),
    ReplyCase(
        "deepseek",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n"
        f"{_FENCED}<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{{}}\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        (WEATHER, NOW),
    ),
    ReplyCase(
        "deepseek_v31",
        f"Ok.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{_JSON}<｜tool▁call▁end｜>"
        "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Ok.",
        (WEATHER, NOW),
    ),
    ReplyCase(
        "qwen3_coder",
        '<tool_call>\n<function=get_weather>\n<parameter=city>\nParis, "FR" 水\n</parameter>\n<parameter=days>\n2\n'
        "</parameter>\n<parameter=zip>\n12\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "",
        (WEATHER, NOW),
    ),
    ReplyCase(
        "glm4_moe",
        '\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris, "FR" 水</arg_value>\n<arg_key>days'
        "</arg_key>\n<arg_value>2</arg_value>\n<arg_key>zip</arg_key>\n<arg_value>12</arg_value>\n</tool_call>"
        "<tool_call>now</tool_call>",
        "",
        (WEATHER, NOW),
    ),
    ReplyCase(
        "kimi",
        "Ok.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        f"{_JSON}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
        "<|tool_calls_section_end|>",
        "Ok.",
        (WEATHER, NOW),
    ),
    ReplyCase("hermes", f'<tool_call>[{{"name": "get_weather", "arguments": {_JSON}}}]</tool_call>', "", (WEATHER,)),
    ReplyCase(
        "xlam",
        f'[{{"name": "get_weather", "arguments": {_JSON}}}, {{"name": "now", "arguments": {{}}}}]',
        "",
        (WEATHER, NOW),
    ),
    ReplyCase("xlam", 'I look.<tool_call>[{"name": "now", "arguments": {}}]</tool_call>', "I look.", (NOW,)),
    ReplyCase("xlam", "[1, 2] is a list", "[1, 2] is a list", ()),
    ReplyCase(
        "phi4_mini",
        f'<|tool_call|>[{{"name": "get_weather", "arguments": {_JSON}}}]<|/tool_call|>'
        '<|tool_call|>{"name": "now"}<|/tool_call|>',
        "",
        (WEATHER, NOW),
    ),
    ReplyCase("functools", 'functools[{"name": "now", "arguments": {}}]', "", (NOW,)),
    ReplyCase(
        "nemotron",
        f'Ok.\n\n<TOOLCALL>[{{"name": "get_weather", "arguments": {_JSON}}}, {{"name": "now"}}]</TOOLCALL>',
        "Ok.",
        (WEATHER, NOW),
    ),
    ReplyCase(
        "tool_calls",
        f'\n<tool_calls>[\n{{"name": "get_weather", "arguments": {_JSON}, "id": "1"}}, {{"name": "now"}}\n]'
        "</tool_calls>",
        "",
        (WEATHER, NOW),
    ),
    ReplyCase(
        "tool_calls",
        f'<tool_calls>\n{{"name": "get_weather", "arguments": {_JSON}}}\n{{"name": "now"}}\n</tool_calls>',
        "",
        (WEATHER, NOW),
    ),
    ReplyCase(
        "internlm",
        f'Ok.<|action_start|><|plugin|>\n{{"name": "get_weather", "parameters": {_JSON}}}<|action_end|>',
        "Ok.",
        (WEATHER,),
    ),
    ReplyCase(
        "command",
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": '
        f'{_JSON}}},\n    {{"tool_call_id": "1", "tool_name": "now", "parameters": {{}}}}\n]<|END_ACTION|>',
        "",
        (WEATHER, NOW),
    ),
    ReplyCase(
        "functionary",
        f"Ok. <function=get_weather>{_JSON}</function>\n<function=now>{{}}</function>",
        "Ok.",
        (WEATHER, NOW),
    ),
    ReplyCase("functionary_32", f"get_weather\n{_JSON}\n>>>now\n{{}}", "", (WEATHER, NOW)),
    ReplyCase("functionary_32", "all\nI look.>>>now\n{}", "I look.", (NOW,)),
    ReplyCase("functionary_32", "all\nnow >>> then", "now >>> then", ()),
    ReplyCase(
        "seed_oss",
        '<seed:tool_call>\n<function=get_weather>\n<parameter=city>Paris, "FR" 水</parameter>\n'
        "<parameter=days>2</parameter>\n<parameter=zip>12</parameter>\n</function>\n</seed:tool_call>",
        "",
        (WEATHER,),
    ),
    ReplyCase(
        "minimax_m2",
        'Ok.\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris, "FR" 水</parameter>\n'
        '<parameter name="days">2</parameter>\n<parameter name="zip">12</parameter>\n</invoke>\n<invoke name="now">\n'
        "</invoke>\n</minimax:tool_call>",
        "Ok.",
        (WEATHER, NOW),
    ),
    ReplyCase(
        "olmo3",
        "Ok.<function_calls>\nget_weather(city='Paris, \"FR\" 水', days=2, zip='12')\nnow()\n</function_calls>",
        "Ok.",
        (WEATHER, NOW),
    ),
    ReplyCase(
        "harmony",
        "<|channel|>analysis<|message|>I must look.<|end|><|start|>assistant<|channel|>commentary<|message|>Wait."
        f"<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{_JSON}",
        "Wait.",
        (WEATHER,),
    ),
    ReplyCase("harmony", "<|channel|>final<|message|>Hi there.\n<|return|>", "Hi there.\n", ()),
)


def joined(events: Sequence[ReplyEvent]) -> tuple[str, str, list[tuple[str | None, str]]]:
    """Content, reasoning, and the calls as (name, arguments text): what stays when ids, which are random, go."""
    reply = collect(events)
    return reply.content, reply.reasoning, [(call.name, call.arguments) for call in reply.tool_calls]


def read(parser: ToolCallParser, pieces: Sequence[str]) -> list[ReplyEvent]:
    events = [event for piece in pieces for event in parser.feed(piece)]
    return [*events, *parser.finish()]


def order(events: Sequence[ReplyEvent]) -> list[object]:
    """The kinds of events in their order, with neighbours of one kind counted once."""
    kinds = [(type(event), event.index if isinstance(event, ToolCallDelta) else None) for event in events]
    return [kind for index, kind in enumerate(kinds) if index == 0 or kind != kinds[index - 1]]
