"""Reasoning is split from content as it comes, also where the prompt has opened it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brlite.chat.reasoning import ReasoningTokenCounter, ends_inside, find_reasoning_key, find_reasoning_marks
from brlite.chat.reply import ReplyParser
from brlite.chat.tool_calls import PARSERS
from brlite.chat.tools import ReplyEvent, collect
from tests.chat.replies import TOOLS, joined, order

MARKS = ("<think>", "</think>")
REPLIES = {
    "<think>\nI am.\n\nSo\n</think>\n\nHi.\n": ("I am.\n\nSo", "Hi.\n"),
    "\n <think></think>Hi": ("", "Hi"),
    "Hi <think>no</think>": ("", "Hi <think>no</think>"),
    " Hi": ("", " Hi"),
    "<think>cut off": ("cut off", ""),
    "<thin": ("", "<thin"),
    "": ("", ""),
}


def read(text: str, borders: list[int], **options: bool) -> list[ReplyEvent]:
    parser = ReplyParser(marks=MARKS, **options)
    events = [event for begin, end in itertools.pairwise(borders) for event in parser.feed(text[begin:end])]
    return [*events, *parser.finish()]


@pytest.mark.parametrize("text", REPLIES)
def test_reasoning_stands_at_the_beginning_of_a_reply(text: str) -> None:
    reply = collect(read(text, [0, len(text)]))

    assert (reply.reasoning, reply.content) == REPLIES[text]


@pytest.mark.parametrize("text", ["I am.\n</think>\n\nHi", "<think>\nI am.</think>Hi"])
def test_a_prompt_that_opened_the_reasoning_is_gone_on_with(text: str) -> None:
    reply = collect(read(text, [0, len(text)], begins_inside=True))

    assert (reply.reasoning, reply.content) == ("I am.", "Hi")


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(REPLIES)), st.text(max_size=4), st.booleans(), st.lists(st.integers(0, 99), max_size=6))
def test_any_cuts_give_the_same_events(text: str, more: str, begins_inside: bool, places: list[int]) -> None:
    text += more
    borders = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})

    whole, cut = (read(text, each, begins_inside=begins_inside) for each in ([0, len(text)], borders))

    assert joined(cut) == joined(whole)
    assert order(cut) == order(whole)


def test_a_call_behind_the_reasoning_is_a_call() -> None:
    parser = ReplyParser(marks=MARKS, calls=PARSERS["hermes"](TOOLS))
    text = '<think><tool_call>{"name": "rm"}</think>\n\n<tool_call>{"name": "now"}</tool_call>'

    reply = collect([event for character in text for event in parser.feed(character)] + parser.finish())

    assert reply.reasoning == '<tool_call>{"name": "rm"}'
    assert reply.content == ""
    assert [call.name for call in reply.tool_calls] == ["now"]
    assert parser.warnings == []


@pytest.mark.parametrize(
    ("template", "marks"),
    [
        ("{{ m.content.split('</think>')[-1] }}", ("<think>", "</think>")),
        ("[THINK]{{ x }}[/THINK]", ("[THINK]", "[/THINK]")),
        ("{{ '<seed:think>' }}</seed:think>", ("<seed:think>", "</seed:think>")),
        ("{{ messages }}", None),
    ],
)
def test_the_marks_are_those_of_the_template(template: str, marks: tuple[str, str] | None) -> None:
    assert find_reasoning_marks(template) == marks


def test_the_key_of_reasoning_in_a_turn_is_the_templates() -> None:
    assert find_reasoning_key("{% if message.reasoning_content is string %}") == "reasoning_content"
    assert find_reasoning_key('{% if "thinking" in message %}') == "thinking"
    assert find_reasoning_key("{% if enable_thinking %} thinking about reasoning") is None


def test_a_prompt_ends_inside_the_reasoning_only_if_it_has_just_opened_it() -> None:
    assert ends_inside("<|im_start|>assistant\n<think>\n", MARKS)
    assert not ends_inside("<think>\n\n</think>\n\n", MARKS)
    assert not ends_inside("write <think> and nothing else<|im_end|>\n<|im_start|>assistant\n", MARKS)


@pytest.mark.parametrize(
    ("tokens", "begins_inside", "expected"),
    [
        (["<think>", "a", " b", "</think>", "\n", "c"], False, 4),
        (["\n", "<think>", "a", "</think>", "<think>", "c"], False, 3),
        (["\n<th", "ink>a", "b</", "think>c", "d"], False, 4),
        (["a", "b", "</think>", "c"], True, 3),
        (["a", "<think>", "b", "</think>"], False, 0),
        (["<thin", "g>", "<think>"], False, 0),
        (["<think>", "a", "b"], False, 3),
        ([], True, 0),
    ],
)
def test_the_tokens_of_reasoning_are_counted_with_its_marks(
    tokens: list[str], begins_inside: bool, expected: int
) -> None:
    counter = ReasoningTokenCounter(("<think>", "</think>"), begins_inside=begins_inside)

    for token in tokens:
        counter.feed(token.encode())

    assert counter.num_tokens == expected


def test_tokens_of_several_reasonings_are_counted() -> None:
    counter = ReasoningTokenCounter(("<|c|>a<|m|>", "<|end|>"), begins_inside=False, several=True)
    text = "<|c|> a <|m|> x y <|end|> <|s|> us <|c|> a <|m|> z <|end|> <|c|> f <|m|> hi"

    for token in text.split():
        counter.feed(token.encode())

    assert counter.num_tokens == 6 + 5
