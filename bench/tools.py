"""What tools cost the server: reading them, and what a long list of them does to other streams.

    python bench/tools.py            # 9 rounds: under a minute
    python bench/tools.py --short    # a round, for CI

Two questions, each with both sides in turns, so that a busy machine slows both; medians of the rounds are compared:

* decoding a chat with 16 tools, against FastAPI with the types of OpenAI's client, as vLLM has them: from the body to
  the handler, and json.loads and pydantic alone (left out where FastAPI or the client is missing);
* how long the event loop stands still while a chat with 80 kB of tools, or a prompt of 100 kB, is read and queued,
  against a short chat. The toy engine answers, so that no model's steps are in the way. The interpreter's settings are
  those of `brlite serve`.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from brlite.app import create_app
from brlite.commands.serve import GC_THRESHOLDS, SWITCH_INTERVAL_SECONDS
from brlite.config.options import Config, EngineConfig, LimitsConfig, ModelSpec
from brlite.dialects.openai_chat import DIALECT
from brlite.http.listen import HttpServer
from brlite.llm import AsyncEngine

LIMITS = LimitsConfig()
NUM_DECODES = 50  # in a round
TICK_SECONDS = 0.001


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--short", action="store_true", help="a round")
    args = parser.parse_args()
    num_rounds = args.rounds or (1 if args.short else 9)
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    gc.set_threshold(*GC_THRESHOLDS)
    compare_decoding(num_rounds)
    asyncio.run(measure_delays(num_rounds))


def tool(number: int, description: str = "Looks up what is known about a customer of this shop.") -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {
            "customer_id": {"type": "string", "description": "As printed on the invoice."},
            "fields": {"type": "array", "items": {"enum": ["name", "address", "orders"]}},
            "limit": {"type": "integer", "minimum": 1, "maximum": 100},
        },
        "required": ["customer_id"],
        "additionalProperties": False,
    }
    function = {"name": f"tool_{number}", "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def chat(content: str = "Who is customer 17?", tools: list[dict[str, Any]] | None = None) -> bytes:
    messages = [{"role": "system", "content": "You help."}, {"role": "user", "content": content}]
    body: dict[str, Any] = {"model": "toy", "messages": messages, "max_tokens": 1, "temperature": 0}
    return json.dumps(body | ({"tools": tools} if tools else {})).encode()


def compare_decoding(num_rounds: int) -> None:
    body = chat(tools=[tool(number) for number in range(16)])
    ways = {"brlite": lambda: DIALECT.decode(body, LIMITS), **fastapi_decoders(body)}
    if len(ways) == 1:
        print("decoding is not compared: fastapi or openai is missing")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(num_rounds):
        for name, decode in ways.items():
            times[name].append(cpu_milliseconds(decode))
    ours = median(times["brlite"])
    print(f"decoding a chat with 16 tools, {len(body)} bytes; median, lowest and highest round:")
    for name, found in times.items():
        middle = median(found)
        print(f"  {name}: {middle:.3f} ms, {min(found):.3f} to {max(found):.3f}; {middle / ours:.1f}x")


def fastapi_decoders(body: bytes) -> dict[str, Callable[[], object]]:
    """What FastAPI does with a body: all up to the handler, without sockets, and reading alone."""
    try:
        from fastapi import FastAPI
        from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
        from pydantic import BaseModel
    except ImportError:
        return {}

    class ChatRequest(BaseModel):
        model: str
        messages: list[ChatCompletionMessageParam]
        tools: list[ChatCompletionToolParam] | None = None
        max_tokens: int | None = None
        temperature: float | None = None

    app = FastAPI()

    async def handle(request: ChatRequest) -> None:
        return None

    handle.__annotations__["request"] = ChatRequest  # FastAPI cannot see names inside this function
    app.post("/v1/chat/completions", status_code=204)(handle)
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    async def send(message: dict[str, Any]) -> None:
        assert message.get("status", 204) == 204, message

    loop = asyncio.new_event_loop()
    return {
        "FastAPI to the handler": lambda: loop.run_until_complete(app(dict(scope), receive, send)),
        "json.loads and pydantic": lambda: ChatRequest.model_validate(json.loads(body)),
    }


def cpu_milliseconds(decode: Callable[[], object]) -> float:
    start = time.thread_time()
    for _ in range(NUM_DECODES):
        decode()
    return (time.thread_time() - start) / NUM_DECODES * 1e3


async def measure_delays(num_rounds: int) -> None:
    """The longest stop of the event loop around one request, by the kind of request."""
    bodies = {
        "a short chat": chat(),
        "80 kB of tools": chat(tools=[tool(number, "x" * 600) for number in range(80)]),
        "a prompt of 100 kB": chat("word " * 20_000),
    }
    config = Config(model=(ModelSpec(name="toy", build_seq=262_144),), engine=EngineConfig(name="toy"))
    stops: dict[str, list[float]] = {kind: [] for kind in bodies}
    async with (
        AsyncEngine.from_config(config) as engine,
        HttpServer(create_app(engine, config), "127.0.0.1", 0, config.limits, grace_seconds=0.2) as server,
    ):
        for _ in range(num_rounds + 1):  # the first compiles the grammar of the calls
            for kind, body in bodies.items():
                stops[kind].append(await longest_stop(server.port, body))
    for kind, (first, *others) in stops.items():
        print(
            f"{kind}, {len(bodies[kind])} bytes: the event loop stops for {median(others) * 1e3:.1f} ms, "
            f"{max(others) * 1e3:.1f} ms at most; {first * 1e3:.1f} ms the first time"
        )


async def longest_stop(port: int, body: bytes) -> float:
    """Seconds by which a tick came late while one request was answered, the client's own part included."""
    stops = [0.0]

    async def tick() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(TICK_SECONDS)
            stops.append(time.perf_counter() - before - TICK_SECONDS)

    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.02)
    stops.clear()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    status = await reader.readline()
    await reader.read()
    ticking.cancel()
    writer.close()
    if b" 200 " not in status:
        raise SystemExit(f"the server answered {status.decode().strip()}")
    return max(stops)


if __name__ == "__main__":
    main()
