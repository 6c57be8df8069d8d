"""Models that reason: the grammar of an answer begins behind the reasoning, opened by the template or the model."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from brlite.backends.plugins.toy_text import ToyChat
from brlite.chat.template import ChatTemplate
from brlite.chat.turns import TemplateCapabilities
from brlite.config.options import ModelSpec
from brlite.dialects.generation import Chat, ReasoningHint
from brlite.server.chat_replies import template_extras
from tests.fakes import EOS, ByteTokenizer
from tests.server.conftest import MODEL, Client

TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
# A model that opens its reasoning itself, and one whose template does unless thinking is off.
TEMPLATES = {
    "by the model": TURNS + "{# <think> </think> #}{% if add_generation_prompt %}assistant: {% endif %}",
    "by the template": TURNS
    + "{% if add_generation_prompt %}assistant: <think>{% if enable_thinking is false %}</think>{% endif %}{% endif %}",
}
SCHEMA = {
    "type": "object",
    "properties": {"is_true": {"type": "boolean"}, "level": {"enum": ["low", "high"]}},
    "required": ["is_true", "level"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
ANSWER = '{"is_true":true,"level":"low"}'
THOUGHT = 'I must say {"is_true": false}, or <tool_call> it is not 1234567890123456789012345 times </thin'
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'

Make = Callable[..., Awaitable[Client]]


class TemplateTokenizer(ByteTokenizer):
    """A byte a token, with a real chat template."""

    def __init__(self, template: str, chat_format: ChatTemplate) -> None:
        super().__init__()
        self.chat_format: Any = chat_format
        self.chat_template_text = template

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extras: Any = None,
    ) -> str:
        return self.chat_format.render(messages, add_generation_prompt=add_generation_prompt, extras=extras)


TokenizerOf = Callable[[str], TemplateTokenizer]


@pytest.fixture(scope="module")
def tokenizer_of() -> Iterator[TokenizerOf]:
    """`tokenizer_of(template)`: a template's process serves all tests of this file."""
    formats: dict[str, ChatTemplate] = {}

    def make(template: str) -> TemplateTokenizer:
        if template not in formats:
            formats[template] = ChatTemplate(template, source="test", special_tokens={})
        return TemplateTokenizer(template, formats[template])

    yield make
    for chat_format in formats.values():
        chat_format.close()


def scripted(reply: str) -> Callable[[Sequence[int], int], int]:
    """A model that says the reply after its prompt, then ends; where it may not, it goes on with the next letter."""
    tokens = [*reply.encode(), EOS]

    def next_token(context: Sequence[int], seed: int) -> int:
        text = bytes(min(token, 255) for token in context)
        start = text.rindex(b"assistant: ") + len(b"assistant: ")
        start += len(b"<think>") * text.startswith(b"<think>", start) * (not reply.startswith("<think>"))
        return tokens[min(len(context) - start, len(tokens) - 1)]

    return next_token


@pytest.fixture(params=TEMPLATES)
def opened(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[0, 7], ids=["without drafts", "with drafts"])
def make(
    request: pytest.FixtureRequest, make_client: Make, tokenizer_of: TokenizerOf, opened: str
) -> Callable[[str], Awaitable[Client]]:
    """`await make(reply)` serves a model that thinks and says this."""

    async def start(reply: str) -> Client:
        opening = "" if opened == "by the template" else "<think>"
        return await make_client(
            tokenizer=tokenizer_of(TEMPLATES[opened]),
            next_token=scripted(opening + reply),
            max_draft_tokens=request.param,
            num_blocks=256,
            max_model_len=1024,
        )

    return start


async def ask(client: Client, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The choice of a whole answer, and the deltas of a stream."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "q"}], "temperature": 0, "max_tokens": 400}
    status, whole = await client.post("/v1/chat/completions", {**body, **fields})
    assert status == 200, whole
    chunks = await client.stream("/v1/chat/completions", {**body, **fields})
    return whole["choices"][0], [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]


def joined(deltas: list[dict[str, Any]], name: str) -> str:
    return "".join(delta.get(name) or "" for delta in deltas)


async def test_a_schema_bounds_the_answer_and_not_the_reasoning(make: Callable[[str], Awaitable[Client]]) -> None:
    client = await make(f"{THOUGHT}</think>\n\n{ANSWER}")

    choice, deltas = await ask(client, response_format=FORMAT)

    assert choice["message"]["reasoning_content"] == joined(deltas, "reasoning_content") == THOUGHT
    assert choice["message"]["content"] == joined(deltas, "content") == ANSWER
    assert choice["finish_reason"] == "stop"


async def test_text_behind_the_reasoning_is_made_to_match(make: Callable[[str], Awaitable[Client]]) -> None:
    client = await make(f"{THOUGHT}</think>\n\nI would rather talk.")

    choice, deltas = await ask(client, response_format=FORMAT)

    assert choice["message"]["reasoning_content"] == THOUGHT
    assert set(json.loads(choice["message"]["content"])) == {"is_true", "level"}
    assert joined(deltas, "content") == choice["message"]["content"]


async def test_reasoning_that_stays_in_the_text_is_not_bound_either(make: Callable[[str], Awaitable[Client]]) -> None:
    client = await make(f"{THOUGHT}</think>\n\n{ANSWER}")

    choice, _ = await ask(client, response_format=FORMAT, separate_reasoning=False)

    assert choice["message"]["content"].endswith(f"{THOUGHT}</think>\n\n{ANSWER}")


async def test_a_required_call_follows_the_reasoning(make: Callable[[str], Awaitable[Client]]) -> None:
    client = await make(f"{THOUGHT}</think>\n\n{CALL}")

    choice, deltas = await ask(client, tools=[NOW], tool_choice="required", parallel_tool_calls=False)

    assert choice["message"]["reasoning_content"] == joined(deltas, "reasoning_content") == THOUGHT
    assert choice["message"]["content"] is None
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["now"]
    assert choice["finish_reason"] == "tool_calls"


async def test_what_looks_like_a_call_in_the_reasoning_stays_reasoning(
    make: Callable[[str], Awaitable[Client]],
) -> None:
    thought = f"Shall I say {CALL}?"
    client = await make(f"{thought}</think>\n\nYes.\n{CALL}")

    choice, deltas = await ask(client, tools=[NOW])

    assert choice["message"]["reasoning_content"] == joined(deltas, "reasoning_content") == thought
    assert choice["message"]["content"] == joined(deltas, "content") == "Yes."
    assert len(choice["message"]["tool_calls"]) == 1


async def test_with_tools_and_a_schema_the_reply_is_a_call_or_matches(make: Callable[[str], Awaitable[Client]]) -> None:
    calling = await make(f"{THOUGHT}</think>\n\n{CALL}")
    answering = await make(f"{THOUGHT}</think>\n\n{ANSWER}")

    call, _ = await ask(calling, tools=[NOW], response_format=FORMAT)
    answer, deltas = await ask(answering, tools=[NOW], response_format=FORMAT)

    assert call["finish_reason"] == "tool_calls"
    assert call["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    assert answer["finish_reason"] == "stop"
    assert answer["message"]["content"] == joined(deltas, "content") == ANSWER


async def test_what_is_wrong_beside_tools_is_told_by_its_field(make: Callable[[str], Awaitable[Client]]) -> None:
    client = await make(f"{THOUGHT}</think>{ANSWER}")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "q"}]}
    wrong = {"type": "object", "properties": {"a": {"not": {}}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": wrong}}
    wrong_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": wrong}}

    _, format_error = await client.post(
        "/v1/chat/completions", {**body, "tools": [NOW], "response_format": wrong_format}
    )
    _, tool_error = await client.post("/v1/chat/completions", {**body, "tools": [tool], "response_format": FORMAT})

    assert format_error["error"]["param"] == "response_format"
    assert tool_error["error"]["param"] == "tools"
    assert "f: at #/properties/a/not" in tool_error["error"]["message"]


async def test_without_thinking_the_answer_begins_at_once(make_client: Make, tokenizer_of: TokenizerOf) -> None:
    tokenizer = tokenizer_of(TEMPLATES["by the template"])
    client = await make_client(
        tokenizer=tokenizer, next_token=lambda context, seed: EOS, num_blocks=256, max_model_len=1024
    )
    kwargs = {"enable_thinking": False}

    choice, _ = await ask(client, response_format=FORMAT, chat_template_kwargs=kwargs)

    assert set(json.loads(choice["message"]["content"])) == {"is_true", "level"}
    assert choice["message"].get("reasoning_content") is None


async def test_the_tokens_of_the_reasoning_are_counted(make: Callable[[str], Awaitable[Client]], opened: str) -> None:
    client = await make(f"Well.</think>\n\n{ANSWER}")
    num_tokens = len("Well.</think>") + len("<think>") * (opened == "by the model")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "q"}], "temperature": 0, "max_tokens": 400}

    for fields in ({}, {"response_format": FORMAT}, {"tools": [NOW]}, {"n": 2}, {"max_tokens": 5}):
        _, whole = await client.post("/v1/chat/completions", {**body, **fields})
        chunks = await client.stream(
            "/v1/chat/completions", {**body, **fields, "stream_options": {"include_usage": True}}
        )
        expected = 5 if "max_tokens" in fields and opened == "by the template" else num_tokens
        expected = 0 if "max_tokens" in fields and opened == "by the model" else expected
        for usage in (whole["usage"], chunks[-1]["usage"]):
            assert usage["completion_tokens_details"] == {"reasoning_tokens": expected * int(fields.get("n", 1))}


HARMONY = TURNS + "{# <|channel|> <|message|> #}{% if add_generation_prompt %}assistant: {% endif %}"
MESSAGES = "<|channel|>analysis<|message|>I must look.<|end|><|start|>assistant"


async def test_messages_of_harmony_before_a_call_and_before_an_answer(
    make_client: Make, tokenizer_of: TokenizerOf
) -> None:
    call = MESSAGES + "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>"
    answer = f"{MESSAGES}<|channel|>final<|message|>{ANSWER}"
    ends = []

    for reply, fields in (
        (call, {"tools": [NOW]}),
        (call, {"tools": [NOW], "tool_choice": "required"}),
        (answer, {"response_format": FORMAT}),
        (answer, {"response_format": FORMAT, "tools": [NOW]}),
    ):
        tokenizer = tokenizer_of(HARMONY)
        client = await make_client(
            tokenizer=tokenizer, next_token=scripted(reply), num_blocks=256, max_model_len=1024, max_draft_tokens=7
        )
        choice, deltas = await ask(client, **fields)
        assert choice["message"]["reasoning_content"] == joined(deltas, "reasoning_content") == "I must look."
        assert (choice["message"]["content"] or "") == joined(deltas, "content")
        ends.append((choice["finish_reason"], choice["message"]["content"]))

    assert ends == [("tool_calls", None)] * 2 + [("stop", ANSWER)] * 2


async def test_the_prompt_of_a_chat_with_tools_is_counted_with_them(
    make_client: Make, tokenizer_of: TokenizerOf
) -> None:
    tokenizer = tokenizer_of("{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}" + TURNS)
    client = await make_client(tokenizer=tokenizer, max_model_len=1024)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "q"}]}

    _, plain = await client.post("/tokenize", body)
    _, told = await client.post("/tokenize", {**body, "tools": [NOW]})

    assert told["count"] > plain["count"] > 0
    assert "now" in bytes(told["tokens"]).decode()


DEEP: Any = {}
for _ in range(90):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
HOSTILE: dict[str, Any] = {
    "16,000 tools": [{"type": "function", "function": {"name": f"f{number}"}} for number in range(16_000)],
    "one name twice": [NOW, NOW],
    "a control character": [{"type": "function", "function": {"name": "a\x00b"}}],
    "a control token": [{"type": "function", "function": {"name": "</tool_call>"}}],
    "600 kB": [{"type": "function", "function": {"name": "f", "description": "x" * 600_000}}],
    "a deep schema": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": DEEP}}],
    "no end": [
        {
            "type": "function",
            "function": {
                "name": "f",
                "strict": True,
                "parameters": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
            },
        }
    ],
    "a schema that is a list": [{"type": "function", "function": {"name": "f", "parameters": []}}],
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_lists_of_tools_are_refused_and_the_server_goes_on(
    make_client: Make, tokenizer_of: TokenizerOf, name: str
) -> None:
    tokenizer = tokenizer_of(TEMPLATES["by the model"])
    client = await make_client(tokenizer=tokenizer, next_token=scripted("Hi."), num_blocks=256, max_model_len=1024)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "q"}], "temperature": 0, "tools": HOSTILE[name]}

    status, error = await client.post("/v1/chat/completions", body)

    assert status == 400, error
    assert error["error"]["param"].startswith(("tools", "messages"))
    assert len(error["error"]["message"]) < 1000
    assert (await client.chat("q"))["choices"][0]["message"]["content"] == "Hi."


@pytest.mark.parametrize(
    ("known", "hint", "expected", "num_warnings"),
    [
        (("enable_thinking",), ReasoningHint(False, None, "e"), {"enable_thinking": False}, 0),
        (("enable_thinking",), ReasoningHint(True, "low", "e"), {"enable_thinking": True}, 1),
        (("reasoning_effort",), ReasoningHint(True, "low", "e"), {"reasoning_effort": "low"}, 0),
        ((), ReasoningHint(True, "high", "e"), {}, 1),
        ((), ReasoningHint(False, "none", "e"), {}, 0),
    ],
)
def test_a_hint_of_reasoning_reaches_the_templates_that_take_it(
    known: tuple[str, ...], hint: ReasoningHint, expected: dict[str, Any], num_warnings: int
) -> None:
    class Format(ToyChat):
        capabilities = TemplateCapabilities(variables=frozenset(known))

    chat = Chat([{"role": "user", "content": "hi"}], reasoning_hint=hint)
    extras, warnings = template_extras(chat, Format(), ModelSpec(name="m"))
    forced, _ = template_extras(chat, Format(), ModelSpec(name="m", chat_template_kwargs={"enable_thinking": "yes"}))

    assert (extras.variables, len(warnings)) == (expected, num_warnings)
    assert forced.variables["enable_thinking"] == "yes"  # the operator's word counts more than a hint
