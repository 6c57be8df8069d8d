"""Agents that use tools by Anthropic's Messages."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import anthropic

from tests.server.conftest import ServeToy
from tests.server.messages import CALL, CALL_NOW, TOOLS, ask, events_of, says

AGENT_TOOLS = [
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
CACHED: Any = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
AGENT_REQUEST: dict[str, Any] = {
    "model": "toy",
    "max_tokens": 32000,
    "stream": True,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=1f2e3;"},
        {"type": "text", "text": "You are an agent.", **CACHED},
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
                {"type": "tool_result", "tool_use_id": "toolu_b", "content": "B", "is_error": False, **CACHED},
            ]
        ),
        says("Only read files.", "system"),
        says([{"type": "text", "text": "And then?", **CACHED}]),
    ],
    "tools": AGENT_TOOLS,
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "xhigh"},
    "metadata": {"user_id": "user_1"},
}


async def test_an_agents_two_turns(serve_toy: ServeToy) -> None:
    client = await serve_toy()

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


async def test_a_coding_agents_request_works(serve_toy: ServeToy) -> None:
    assert len(json.dumps(AGENT_TOOLS)) > 64_000
    client = await serve_toy(build_seq=262_144)

    async with aiohttp.ClientSession(str(client.base_url)) as session:
        async with session.head("/") as head:
            assert head.status == 200
        async with session.post(
            "/v1/messages/count_tokens?beta=true", json={**AGENT_REQUEST, "max_tokens": None}
        ) as response:
            count = await response.json()
        async with session.post(
            "/v1/messages?beta=true", json=AGENT_REQUEST, headers={"anthropic-beta": "a-1,b"}
        ) as response:
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


async def test_the_clients_own_loop_of_tools(serve_toy: ServeToy) -> None:
    client = await serve_toy()
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


async def test_a_call_that_is_cut_is_no_call_to_make(serve_toy: ServeToy) -> None:
    client = await serve_toy()

    answer = await ask(client, CALL, tools=TOOLS, max_tokens=66)

    assert answer.stop_reason == "max_tokens"
    assert [(block.type, block.input) for block in answer.content] == [("tool_use", {})]


async def test_a_call_that_a_stop_sequence_cuts_is_no_call_to_make(serve_toy: ServeToy) -> None:
    client = await serve_toy()

    answer = await ask(client, CALL, tools=TOOLS, stop_sequences=["Par"])
    async with client.messages.stream(
        model="toy", max_tokens=1000, messages=[says(CALL)], tools=TOOLS, stop_sequences=["Par"]
    ) as stream:
        streamed = await stream.get_final_message()
    whole = await ask(client, f"{CALL}\nRome", tools=TOOLS, stop_sequences=["Rome"])

    for message in (answer, streamed):
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "Par")
    assert (whole.stop_reason, whole.content[0].input) == ("tool_use", {"city": "Paris", "days": 2})
