"""Requests and answers of Anthropic's Messages. The toy says again what it was told: a user's words are the reply."""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import anthropic

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
