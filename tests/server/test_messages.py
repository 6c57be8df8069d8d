"""Anthropic's Messages with its own client: the toy says again what it was told, so a user's words are the reply."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Literal

import aiohttp
import anthropic
import pydantic
import pytest
from aiohttp import web
from anthropic.types import Message, RawMessageStreamEvent
from anthropic.types.beta import BetaMessage, BetaRawMessageStreamEvent

from brlite.app import create_app
from brlite.backends.plugins.toy_text import ToyChat
from brlite.chat.turns import TemplateCapabilities
from brlite.config.options import (
    DEFAULT_MODEL,
    Config,
    EngineConfig,
    KeyConfig,
    LimitsConfig,
    ModelSpec,
    UpstreamConfig,
)
from brlite.dialects.generation import Chat, ReasoningHint
from brlite.http.listen import HttpServer
from brlite.llm import AsyncEngine
from brlite.server.chat_replies import template_extras
from brlite.server.generate import end_all
from tests.api_clients import NO_CERTIFICATES
from tests.limits import PATIENCE_SECONDS
from tests.proxy.proxies import run_proxy

WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather.",
    "input_schema": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
NOW: Any = {"name": "now", "input_schema": {"type": "object", "properties": {}}}
TOOLS = [WEATHER, NOW]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city":"Paris","days":2}}\n</tool_call>'
CALL_NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
THOUGHT = "<think>I must look.</think>"
STREAM: Any = pydantic.TypeAdapter(RawMessageStreamEvent)
BETA_STREAM: Any = pydantic.TypeAdapter(BetaRawMessageStreamEvent)

Serve = Callable[..., Awaitable[anthropic.AsyncAnthropic]]


@pytest.fixture
def apps() -> list[web.Application]:
    """The applications that `serve` has started."""
    return []


@pytest.fixture
async def serve(apps: list[web.Application]) -> AsyncIterator[Serve]:
    """`await serve(keys=…, limits=…, OPTION_OF_THE_MODEL=…)` serves the toy, and returns a client."""
    async with AsyncExitStack() as stack:

        async def start(
            keys: tuple[KeyConfig, ...] = (),
            limits: dict[str, Any] | None = None,
            engine: dict[str, Any] | None = None,
            **options: Any,
        ) -> anthropic.AsyncAnthropic:
            spec = ModelSpec(**{"name": "toy", "path": None, "build_seq": 4096, "reasoning_parser": "think", **options})
            config = Config(
                model=(spec,),
                engine=EngineConfig(name="toy", options=engine or {}),
                limits=LimitsConfig(**(limits or {})),
                key=keys,
            )
            loop = await stack.enter_async_context(AsyncEngine.from_config(config))
            apps.append(create_app(loop, config))
            server = HttpServer(apps[-1], "127.0.0.1", 0, config.limits, grace_seconds=0.2)
            await stack.enter_async_context(server)
            client = anthropic.AsyncAnthropic(
                base_url=server.url,
                api_key="none",
                max_retries=0,
                timeout=PATIENCE_SECONDS,
                http_client=anthropic.DefaultAsyncHttpxClient(verify=NO_CERTIFICATES),
            )
            return await stack.enter_async_context(client)

        yield start


def says(text: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": text}


async def ask(client: anthropic.AsyncAnthropic, *messages: Any, **fields: Any) -> Any:
    messages = tuple(says(message) if isinstance(message, str) else message for message in messages)
    return await client.messages.create(**{"model": "toy", "max_tokens": 512, "messages": messages, **fields})


async def wire(client: anthropic.AsyncAnthropic, message: str, **fields: Any) -> str:
    """The text of the answer, as it was sent."""
    body = {"model": "toy", "max_tokens": 512, "messages": [says(message)], **fields}
    async with (
        aiohttp.ClientSession(str(client.base_url)) as session,
        session.post("/v1/messages", json=body) as response,
    ):
        return await response.text()


def events_of(text: str) -> list[Any]:
    """The events of a stream, whose names must be their types."""
    parts = [part.split("\n") for part in text.split("\n\n")[:-1] if not part.startswith(":")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in parts]
    assert [name for name, _ in parts] == [f"event: {event['type']}" for event in events]
    return events


def extras_of(value: Any) -> list[str]:
    """The fields of a model, and of all models in it, that its type does not have."""
    if isinstance(value, list):
        return [name for each in value for name in extras_of(each)]
    if not isinstance(value, pydantic.BaseModel):
        return []
    names = list(value.model_extra or ())
    return names + [name for field in type(value).model_fields for name in extras_of(getattr(value, field))]


async def test_an_agents_two_turns(serve: Serve) -> None:
    client = await serve()

    first = await ask(client, f"I look.\n{CALL}\nAnd when?\n{CALL_NOW}", tools=TOOLS)
    texts, calls = ([each for each in first.content if each.type == kind] for kind in ("text", "tool_use"))
    results = [
        {"type": "tool_result", "tool_use_id": calls[1].id, "content": [{"type": "text", "text": "noon"}]},
        {"type": "tool_result", "tool_use_id": calls[0].id, "content": "no city", "is_error": True},
        {"type": "text", "text": "So?"},
    ]
    second = await ask(client, "What now?", says(first.content, "assistant"), says(results), tools=TOOLS)

    assert [block.type for block in first.content] == ["text", "tool_use", "text", "tool_use"]
    assert [text.text.strip() for text in texts] == ["I look.", "And when?"]
    assert [(call.name, call.input) for call in calls] == [("get_weather", {"city": "Paris", "days": 2}), ("now", {})]
    assert all(call.id.startswith("toolu_") for call in calls)
    assert (first.stop_reason, first.stop_sequence, second.stop_reason) == ("tool_use", None, "end_turn")
    assert second.content[0].text == (
        "<tool_response>\nnoon\n</tool_response>\n<tool_response>\nError: no city\n</tool_response>\nSo?"
    )


async def test_a_stream_comes_to_the_same_message_as_without_one(serve: Serve) -> None:
    client = await serve()
    fields: dict[str, Any] = {"tools": TOOLS, "thinking": {"type": "adaptive"}}

    whole = await ask(client, f"{THOUGHT}I look.\n{CALL}\n{CALL_NOW}\nThat is all.", **fields)
    async with client.messages.stream(
        model="toy", max_tokens=512, messages=[says(f"{THOUGHT}I look.\n{CALL}\n{CALL_NOW}\nThat is all.")], **fields
    ) as stream:
        final = await stream.get_final_message()

    def told(message: Any) -> Any:
        blocks = message.model_dump(include={"content", "stop_reason", "stop_sequence", "usage", "model", "role"})
        return json.loads(re.sub(r"toolu_\w+", "toolu_1", json.dumps(blocks, default=str)))

    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use", "text"]
    assert told(final) == told(whole)


@pytest.mark.parametrize("text", ["hello", f"{THOUGHT}I look.\n{CALL}\n{CALL_NOW}"])
async def test_events_and_messages_have_what_the_clients_types_say_and_no_more(serve: Serve, text: str) -> None:
    client = await serve()
    fields: dict[str, Any] = {"tools": TOOLS, "thinking": {"type": "adaptive"}}

    events = events_of(await wire(client, text, stream=True, **fields))
    message = await wire(client, text, **fields)

    for event in events:
        if event["type"] != "ping":
            assert extras_of(STREAM.validate_python(event)) == []
            assert extras_of(BETA_STREAM.validate_python(event)) == []
    assert extras_of(Message.model_validate_json(message)) == []
    assert extras_of(BetaMessage.model_validate_json(message)) == []


PLAIN_STREAM = """\
event: message_start
data: {"type":"message_start","message":{"type":"message","id":"msg_1","role":"assistant","model":"toy","content":[],\
"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":4,"output_tokens":0,"cache_creation_input_tokens":0,\
"cache_read_input_tokens":0}}}

event: ping
data: {"type":"ping"}

event: content_block_start
data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"h"}}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"i"}}

event: content_block_stop
data: {"type":"content_block_stop","index":0}

event: message_delta
data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"input_tokens":4,\
"output_tokens":3,"cache_creation_input_tokens":0,"cache_read_input_tokens":0}}

event: message_stop
data: {"type":"message_stop"}

"""
TOOL_STREAM = """\
event: message_start
data: {"type":"message_start","message":{"type":"message","id":"msg_1","role":"assistant","model":"toy","content":[],\
"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":INPUT,"output_tokens":0,\
"cache_creation_input_tokens":0,"cache_read_input_tokens":0}}}

event: ping
data: {"type":"ping"}

event: content_block_start
data: {"type":"content_block_start","index":0,"content_block":{"type":"thinking","thinking":"","signature":""}}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"thinking_delta","thinking":"M"}}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"signature_delta","signature":"brlite"}}

event: content_block_stop
data: {"type":"content_block_stop","index":0}

event: content_block_start
data: {"type":"content_block_start","index":1,"content_block":{"type":"text","text":""}}

event: content_block_delta
data: {"type":"content_block_delta","index":1,"delta":{"type":"text_delta","text":"A"}}

event: content_block_stop
data: {"type":"content_block_stop","index":1}

event: content_block_start
data: {"type":"content_block_start","index":2,"content_block":{"type":"tool_use","id":"toolu_1","name":"now",\
"input":{}}}

event: content_block_delta
data: {"type":"content_block_delta","index":2,"delta":{"type":"input_json_delta","partial_json":"{"}}

event: content_block_delta
data: {"type":"content_block_delta","index":2,"delta":{"type":"input_json_delta","partial_json":"}"}}

event: content_block_stop
data: {"type":"content_block_stop","index":2}

event: message_delta
data: {"type":"message_delta","delta":{"stop_reason":"tool_use","stop_sequence":null},"usage":{"input_tokens":INPUT,\
"output_tokens":OUTPUT,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,\
"output_tokens_details":{"thinking_tokens":THINKING}}}

event: message_stop
data: {"type":"message_stop"}

"""


async def test_the_golden_text_of_a_plain_stream(serve: Serve) -> None:
    client = await serve()

    text = await wire(client, "hi", stream=True)

    assert re.sub(r"msg_\w+", "msg_1", text) == PLAIN_STREAM


async def test_a_stream_whose_text_begins_with_white_space_goes_on_after_it(serve: Serve) -> None:
    client = await serve(reasoning_parser="none", engine={"tokens_per_second": 200})

    events = events_of(await wire(client, "\n\n  hi", stream=True))

    assert "".join(event["delta"]["text"] for event in events if event["type"] == "content_block_delta") == "\n\n  hi"
    assert events[-1] == {"type": "message_stop"}


async def test_the_golden_text_of_a_stream_with_thinking_and_a_tool(serve: Serve) -> None:
    client = await serve()

    said = f"<think>M</think>A{CALL_NOW}"
    text = await wire(client, said, stream=True, tools=[NOW], thinking={"type": "adaptive"})

    golden = re.sub("INPUT|OUTPUT|THINKING", r"\\d+", re.escape(TOOL_STREAM))
    assert re.fullmatch(golden, re.sub(r"toolu_\w+", "toolu_1", re.sub(r"msg_\w+", "msg_1", text))), text


async def test_the_clients_own_loop_of_tools(serve: Serve) -> None:
    client = await serve()
    asked: list[str] = []

    @anthropic.beta_async_tool
    async def get_weather(city: str, days: int) -> str:
        """The weather."""
        asked.append(f"{city} {days}")
        return "sunny"

    runner = client.beta.messages.tool_runner(
        model="toy", max_tokens=512, messages=[{"role": "user", "content": CALL}], tools=[get_weather]
    )
    answers = [message async for message in runner]

    assert asked == ["Paris 2"]
    assert [answer.stop_reason for answer in answers] == ["tool_use", "end_turn"]
    assert "sunny" in answers[-1].content[0].text  # type: ignore[union-attr]


async def test_a_pydantic_class_is_parsed(serve: Serve) -> None:
    class Weather(pydantic.BaseModel):
        city: str
        days: int
        kind: Literal["sun", "rain"]

    client = await serve()

    parsed = await client.messages.parse(
        model="toy",
        max_tokens=512,
        messages=[{"role": "user", "content": '{"city":"Paris","days":2,"kind":"sun"}'}],
        output_format=Weather,
    )

    assert parsed.parsed_output == Weather(city="Paris", days=2, kind="sun")


async def test_tokens_are_counted_as_the_message_does(serve: Serve) -> None:
    client = await serve()
    fields: Any = {"model": "toy", "system": [{"type": "text", "text": "Be brief."}], "tools": TOOLS}

    count = await client.messages.count_tokens(messages=[says("hi")], **fields)
    answer = await ask(client, "hi", **fields)

    assert count.input_tokens == answer.usage.input_tokens > len("Be brief.")


@pytest.mark.parametrize(
    ("thinking", "kinds"),
    [
        (None, ["text"]),
        ({"type": "disabled"}, ["text"]),
        ({"type": "adaptive"}, ["thinking", "text"]),
        ({"type": "enabled", "budget_tokens": 1024}, ["thinking", "text"]),
        ({"type": "adaptive", "display": "omitted"}, ["text"]),
    ],
)
async def test_reasoning_is_told_where_it_is_asked_for(serve: Serve, thinking: Any, kinds: list[str]) -> None:
    client = await serve()

    answer = await ask(client, f"{THOUGHT}So.", **({"thinking": thinking} if thinking else {}))

    assert [block.type for block in answer.content] == kinds
    assert answer.content[-1].text == "So."
    if "thinking" in kinds:
        assert (answer.content[0].thinking, bool(answer.content[0].signature)) == ("I must look.", True)


async def test_an_answer_ends_for_a_reason(serve: Serve) -> None:
    client = await serve()

    cut = await ask(client, "hello", max_tokens=2)
    stopped = await ask(client, "hello", stop_sequences=["x", "lo"])
    continued = await ask(client, "hello", says("hel", "assistant"))

    assert (cut.content[0].text, cut.stop_reason, cut.usage.output_tokens) == ("he", "max_tokens", 2)
    assert (stopped.content[0].text, stopped.stop_reason, stopped.stop_sequence) == ("hel", "stop_sequence", "lo")
    assert continued.stop_reason == "end_turn"


async def test_a_call_that_is_cut_is_no_call_to_make(serve: Serve) -> None:
    client = await serve()

    answer = await ask(client, CALL, tools=TOOLS, max_tokens=66)

    assert answer.stop_reason == "max_tokens"
    assert [(block.type, block.input) for block in answer.content] == [("tool_use", {})]


async def test_a_call_that_a_stop_sequence_cuts_is_no_call_to_make(serve: Serve) -> None:
    client = await serve()

    answer = await ask(client, CALL, tools=TOOLS, stop_sequences=["Par"])
    async with client.messages.stream(
        model="toy", max_tokens=1000, messages=[says(CALL)], tools=TOOLS, stop_sequences=["Par"]
    ) as stream:
        streamed = await stream.get_final_message()
    whole = await ask(client, f"{CALL}\nRome", tools=TOOLS, stop_sequences=["Rome"])

    for message in (answer, streamed):
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "Par")
    assert (whole.stop_reason, whole.content[0].input) == ("tool_use", {"city": "Paris", "days": 2})


async def test_each_refusal_has_its_exception(serve: Serve) -> None:
    keys = (
        KeyConfig(name="one", key="one"),
        KeyConfig(name="other", key="other", models=("elsewhere",)),
        KeyConfig(name="spent", key="spent", requests_per_minute=1),
    )
    client = await serve(keys=keys, limits={"max_body_bytes": 8192})
    one, other, spent = (client.with_options(api_key=key) for key in ("one", "other", "spent"))

    await ask(spent, "hi")
    for error, kind, call in (
        (anthropic.AuthenticationError, "authentication_error", ask(client, "hi")),
        (anthropic.PermissionDeniedError, "permission_error", ask(other, "hi")),
        (anthropic.RateLimitError, "rate_limit_error", ask(spent, "hi")),
        (anthropic.NotFoundError, "not_found_error", ask(one, "hi", model="claude")),
        (anthropic.BadRequestError, "invalid_request_error", ask(one, "hi", extra_body={"temperature": -1})),
        (anthropic.BadRequestError, "invalid_request_error", ask(one, "hi" * 3000)),
        (anthropic.RequestTooLargeError, "request_too_large", ask(one, "hi" * 8192)),
    ):
        with pytest.raises(error) as refusal:
            await call
        body: Any = refusal.value.body
        assert (body["type"], body["error"]["type"]) == ("error", kind)
        assert refusal.value.request_id is not None
        assert refusal.value.body["request_id"] == refusal.value.request_id  # type: ignore[index]
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: 6002 tokens > 4095 maximum"):
        await ask(one, "hi" * 3000)
    with pytest.raises(anthropic.RateLimitError) as limited:
        await ask(spent, "hi")
    assert int(limited.value.response.headers["retry-after"]) > 0


async def test_a_key_may_come_in_either_header(serve: Serve) -> None:
    client = await serve(keys=(KeyConfig(name="one", key="one"),))

    async with anthropic.AsyncAnthropic(base_url=client.base_url, auth_token="one") as other:
        bearer = await ask(other, "hi")
    x_api_key = await ask(client.with_options(api_key="one"), "hi", extra_headers={"anthropic-version": "2042-01-01"})

    assert bearer.content == x_api_key.content


async def test_a_coding_agents_request_works(serve: Serve) -> None:
    tools = [
        {
            "name": f"tool_{number}",
            "description": "It does what it does. " * 40,
            "input_schema": {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "type": "object",
                "properties": {"path": {"type": "string"}},
                "required": ["path"],
                "additionalProperties": False,
            },
            "cache_control": {"type": "ephemeral"},
        }
        for number in range(60)
    ]
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    body: dict[str, Any] = {
        "model": "toy",
        "max_tokens": 32000,
        "stream": True,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=1f2e3;"},
            {"type": "text", "text": "You are an agent.", **cached},
        ],
        "messages": [
            says(
                [
                    {"type": "text", "text": "<system-reminder>Be good.</system-reminder>"},
                    {"type": "text", "text": "Go"},
                ]
            ),
            says(
                [
                    {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                    {"type": "text", "text": "I look."},
                    {"type": "tool_use", "id": "toolu_a", "name": "tool_1", "input": {"path": "a"}},
                    {"type": "tool_use", "id": "toolu_b", "name": "tool_2", "input": {"path": "b"}},
                ],
                "assistant",
            ),
            says(
                [
                    {"type": "tool_result", "tool_use_id": "toolu_a", "content": [{"type": "text", "text": "A"}]},
                    {"type": "tool_result", "tool_use_id": "toolu_b", "content": "B", "is_error": False, **cached},
                ]
            ),
            says("Only read files.", "system"),
            says([{"type": "text", "text": "And then?", **cached}]),
        ],
        "tools": tools,
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "xhigh"},
        "metadata": {"user_id": "user_1"},
    }
    assert len(json.dumps(tools)) > 64_000
    client = await serve(build_seq=262_144)

    async with aiohttp.ClientSession(str(client.base_url)) as session:
        async with session.head("/") as head:
            assert head.status == 200
        async with session.post("/v1/messages/count_tokens?beta=true", json={**body, "max_tokens": None}) as response:
            count = await response.json()
        async with session.post("/v1/messages?beta=true", json=body, headers={"anthropic-beta": "a-1,b"}) as response:
            events = events_of(await response.text())
    final = events[-2]

    assert count["input_tokens"] == events[0]["message"]["usage"]["input_tokens"]
    assert "".join(event["delta"]["text"] for event in events if event.get("delta", {}).get("text")) == (
        "<tool_response>\nA\n</tool_response>\n<tool_response>\nB\n</tool_response>\n"
        "<system>\nOnly read files.\n</system>\n\nAnd then?"
    )
    assert (final["type"], final["delta"]["stop_reason"]) == ("message_delta", "end_turn")
    for said in ("context_management", "output_config.effort xhigh", "system message"):
        assert any(said in line for line in final["warnings"])


async def test_what_the_engine_refuses_is_told_in_the_clients_words(serve: Serve) -> None:
    client = await serve(limits={"max_stop_length": 3})

    with pytest.raises(anthropic.BadRequestError, match="a stop string may have") as refusal:
        await ask(client, "hello", stop_sequences=["long one"])

    assert refusal.value.body["error"]["param"] == "stop_sequences"  # type: ignore[index]


async def test_a_forwarded_message_is_the_other_servers_and_its_usage_is_charged(serve: Serve) -> None:
    far = await serve()
    near = UpstreamConfig(url=str(far.base_url).rstrip("/"), name="far", models=("toy",))
    team = KeyConfig(name="team", key="team", tokens_per_minute=10**6)

    async with run_proxy(near, key=(team,)) as proxy:
        async with anthropic.AsyncAnthropic(
            base_url=f"http://127.0.0.1:{proxy.port}", api_key="team", max_retries=0, timeout=PATIENCE_SECONDS
        ) as client:
            whole = await ask(client, f"I look.\n{CALL}", tools=TOOLS)
            async with client.messages.stream(
                model="toy", max_tokens=512, messages=[{"role": "user", "content": f"I look.\n{CALL}"}], tools=TOOLS
            ) as stream:
                streamed = await stream.get_final_message()
            count = await client.messages.count_tokens(model="toy", messages=[says("hi")])
            with pytest.raises(anthropic.NotFoundError) as refusal:
                await ask(client, "hi", model="other")
        (key,) = proxy.keys

    assert [block.type for block in whole.content] == [block.type for block in streamed.content] == ["text", "tool_use"]
    assert whole.usage == streamed.usage
    assert count.input_tokens == 4
    assert refusal.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    assert (key.usage.prompt_tokens, key.usage.completion_tokens) == (
        2 * whole.usage.input_tokens,
        2 * whole.usage.output_tokens,
    )


async def test_a_stream_of_a_server_that_stops_ends_with_an_error(serve: Serve, apps: list[web.Application]) -> None:
    client = await serve(engine={"tokens_per_second": 5.0})

    async with client.messages.stream(
        model="toy", max_tokens=512, messages=[{"role": "user", "content": "x" * 400}]
    ) as stream:
        texts = aiter(stream.text_stream)
        await anext(texts)
        end_all(apps[-1])
        with pytest.raises(anthropic.APIStatusError) as error:
            async for _ in texts:
                pass

    body: Any = error.value.body
    assert (body["type"], body["error"]["type"]) == ("error", "overloaded_error")


async def test_the_example_of_the_page_runs(serve: Serve) -> None:
    client = await serve(name=DEFAULT_MODEL)
    page = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page.split("\n## Messages\n")[1].split("\n## ")[0], re.DOTALL)
    code = example.replace("http://127.0.0.1:8000", str(client.base_url))

    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
    printed, _ = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)

    assert process.returncode == 0
    assert printed.startswith(b"Name a river.Usage(")


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
