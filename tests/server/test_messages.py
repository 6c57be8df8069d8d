"""Anthropic's Messages with its own client: answers, counts, keys, refusals."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import anthropic
import pydantic
import pytest

from brlite.config.options import DEFAULT_MODEL, KeyConfig, UpstreamConfig
from tests.limits import PATIENCE_SECONDS
from tests.proxy.proxies import run_proxy
from tests.server.conftest import ServeToy
from tests.server.messages import CALL, THOUGHT, TOOLS, ask, says


async def test_a_pydantic_class_is_parsed(serve_toy: ServeToy) -> None:
    class Weather(pydantic.BaseModel):
        city: str
        days: int
        kind: Literal["sun", "rain"]

    client = await serve_toy()

    parsed = await client.messages.parse(
        model="toy",
        max_tokens=512,
        messages=[{"role": "user", "content": '{"city":"Paris","days":2,"kind":"sun"}'}],
        output_format=Weather,
    )

    assert parsed.parsed_output == Weather(city="Paris", days=2, kind="sun")


async def test_tokens_are_counted_as_the_message_does(serve_toy: ServeToy) -> None:
    client = await serve_toy()
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
async def test_reasoning_is_told_where_it_is_asked_for(serve_toy: ServeToy, thinking: Any, kinds: list[str]) -> None:
    client = await serve_toy()

    answer = await ask(client, f"{THOUGHT}So.", **({"thinking": thinking} if thinking else {}))

    assert [block.type for block in answer.content] == kinds
    assert answer.content[-1].text == "So."
    if "thinking" in kinds:
        assert (answer.content[0].thinking, bool(answer.content[0].signature)) == ("I must look.", True)


async def test_an_answer_ends_for_a_reason(serve_toy: ServeToy) -> None:
    client = await serve_toy()

    cut = await ask(client, "hello", max_tokens=2)
    stopped = await ask(client, "hello", stop_sequences=["x", "lo"])
    continued = await ask(client, "hello", says("hel", "assistant"))

    assert (cut.content[0].text, cut.stop_reason, cut.usage.output_tokens) == ("he", "max_tokens", 2)
    assert (stopped.content[0].text, stopped.stop_reason, stopped.stop_sequence) == ("hel", "stop_sequence", "lo")
    assert continued.stop_reason == "end_turn"


async def test_each_refusal_has_its_exception(serve_toy: ServeToy) -> None:
    keys = (
        KeyConfig(name="one", key="one"),
        KeyConfig(name="other", key="other", models=("elsewhere",)),
        KeyConfig(name="spent", key="spent", requests_per_minute=1),
    )
    client = await serve_toy(keys=keys, limits={"max_body_bytes": 8192})
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


async def test_a_key_may_come_in_either_header(serve_toy: ServeToy) -> None:
    client = await serve_toy(keys=(KeyConfig(name="one", key="one"),))

    async with anthropic.AsyncAnthropic(base_url=client.base_url, auth_token="one") as other:
        bearer = await ask(other, "hi")
    x_api_key = await ask(client.with_options(api_key="one"), "hi", extra_headers={"anthropic-version": "2042-01-01"})

    assert bearer.content == x_api_key.content


async def test_what_the_engine_refuses_is_told_in_the_clients_words(serve_toy: ServeToy) -> None:
    client = await serve_toy(limits={"max_stop_length": 3})

    with pytest.raises(anthropic.BadRequestError, match="a stop string may have") as refusal:
        await ask(client, "hello", stop_sequences=["long one"])

    assert refusal.value.body["error"]["param"] == "stop_sequences"  # type: ignore[index]


async def test_a_forwarded_message_is_the_other_servers_and_its_usage_is_charged(serve_toy: ServeToy) -> None:
    far = await serve_toy()
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


async def test_the_example_of_the_page_runs(serve_toy: ServeToy) -> None:
    client = await serve_toy(name=DEFAULT_MODEL)
    page = (Path(__file__).parents[2] / "docs" / "http-api.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page.split("\n## Messages\n")[1].split("\n## ")[0], re.DOTALL)
    code = example.replace("http://127.0.0.1:8000", str(client.base_url))

    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
    printed, _ = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)

    assert process.returncode == 0
    assert printed.startswith(b"Name a river.Usage(")
