"""Parsers of calls: any text ends in events that lose nothing but marks, the same however it is cut."""

from __future__ import annotations

import itertools
import json

from hypothesis import strategies as st

from brlite.chat.tool_calls import PARSERS
from brlite.chat.tools import Tool, ToolChoice, collect
from brlite.config.options import GrammarConfig
from brlite.grammar.compiler import GrammarCompiler
from brlite.grammar.matcher import Grammar
from brlite.sampling_params import StructuredOutput
from brlite.server.chat_replies import call_grammar
from tests.chat.replies import CASES, TOOLS, function, joined, order, read
from tests.fuzz.budget import PLACES, fuzz
from tests.grammar.answers import LongTokens, write

TOKENIZER = LongTokens()
MARKS = sorted({mark for parser in PARSERS.values() for mark in parser.marks})
WORDS = st.sampled_from(
    [
        *MARKS,
        *"{}[]()\"'\\,:;=\n ",
        "now",
        "get_weather",
        '"name"',
        '"arguments"',
        "null",
        "[ARGS]",
        "```",
        "tool_call(",
    ]
)
TEXTS = st.lists(WORDS | st.text(max_size=4) | st.sampled_from([case.text for case in CASES]), max_size=12).map("".join)


@fuzz(st.tuples(TEXTS, PLACES, st.sampled_from(sorted(PARSERS)), st.booleans()))
def test_any_text_is_read_without_an_error_and_alike_in_pieces(case: tuple[str, list[int], str, bool]) -> None:
    text, places, name, streams = case
    borders = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    parsers = [PARSERS[name](TOOLS, streams_arguments=streams) for _ in range(2)]

    whole = read(parsers[0], [text])
    cut = read(parsers[1], [text[begin:end] for begin, end in itertools.pairwise(borders)])

    assert joined(cut) == joined(whole)
    assert order(cut) == order(whole)
    assert parsers[0].warnings == parsers[1].warnings
    if not streams:
        for call in collect(whole).tool_calls:
            assert call.name in {tool.name for tool in TOOLS}
            assert isinstance(json.loads(call.arguments), dict)


# Replies in the other two formats have headers.
@fuzz(st.tuples(TEXTS, st.sampled_from(sorted(set(PARSERS) - {"harmony", "functionary_32"}))))
def test_text_without_tools_stays_as_it_is(case: tuple[str, str]) -> None:
    text, name = case
    no_tools: tuple[Tool, ...] = ()

    reply = collect(read(PARSERS[name](no_tools), [text]))

    assert (reply.content, reply.tool_calls) == (text, ())


ANY_TEXT = function("f", {"type": "object", "properties": {"s": {"type": "string"}}, "required": ["s"]})
GRAMMARS: dict[str, Grammar] = {}


def grammar_of(name: str) -> Grammar:
    """The grammar of forced calls in this format, compiled once."""
    if name not in GRAMMARS:
        calls = call_grammar(PARSERS[name], (ANY_TEXT, *TOOLS), ToolChoice(mode="required"))
        compiler = GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size, GrammarConfig())  # type: ignore[arg-type]
        GRAMMARS[name] = compiler.compile(StructuredOutput(calls=calls))
    return GRAMMARS[name]


@fuzz(st.tuples(st.sampled_from(sorted(PARSERS)), st.integers(0, 10**6), PLACES), examples=120)
def test_what_a_grammar_writes_is_read_again_alike_in_pieces(case: tuple[str, int, list[int]]) -> None:
    name, seed, places = case
    written = write(grammar_of(name), TOKENIZER, temperature=1.0, seed=seed, max_tokens=300)
    borders = sorted({place % (len(written.text) + 1) for place in places} | {0, len(written.text)})
    tools = (ANY_TEXT, *TOOLS)
    parsers = [PARSERS[name](tools, streams_arguments=True) for _ in range(2)]

    whole = read(parsers[0], [written.text])
    cut = read(parsers[1], [written.text[begin:end] for begin, end in itertools.pairwise(borders)])

    assert joined(cut) == joined(whole)
    assert order(cut) == order(whole)
    if written.is_ended:
        assert parsers[0].warnings == []
        assert collect(whole).content == ""
        for call in collect(whole).tool_calls:
            assert isinstance(json.loads(call.arguments), dict)
