"""The worked examples of docs/architecture.md, served by the whole application."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from brlite.app import create_app
from brlite.config.options import Config, ModelSpec
from brlite.engine.async_engine import EngineLoop
from brlite.engine.engine import Engine
from brlite.http.body import leave_body
from brlite.http.listen import HttpServer
from brlite.server.generate import generate
from tests.fakes import ByteTokenizer, FakeBackend
from tests.tiny_models import TINY_CONFIGS

PAGE = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")


def example(heading: str) -> dict[str, Any]:
    """What the first code block under a heading defines."""
    found = re.search(r"```python\n(.*?)```", PAGE.split(f"### {heading}\n", 1)[1], re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)
    return names


@pytest.fixture
async def url() -> AsyncIterator[str]:
    config, backend = Config(model=(ModelSpec(name="fake", path="x", build_seq=64),)), FakeBackend()
    engine = EngineLoop(Engine(backend.info, ByteTokenizer(), config.engine, config.limits), backend)  # type: ignore[arg-type]
    dialect = example("A dialect")["DIALECT"]
    app = create_app(engine, config)
    app.router.add_post(dialect.path, partial(generate, dialect), expect_handler=leave_body)
    app.router.add_post("/count", example("An endpoint")["count"], expect_handler=leave_body)
    async with engine, HttpServer(app, "127.0.0.1", 0, config.limits) as server:
        yield server.url


async def post(url: str, body: object) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as response:
        return response.status, await response.text()


async def test_a_new_dialect_is_answered_whole_and_streamed(url: str) -> None:
    _, whole = await post(f"{url}/plain", {"text": "ab", "length": 4, "frob": 1})
    _, streamed = await post(f"{url}/plain", {"text": "ab", "length": 4, "stream": True})

    answer = json.loads(whole)
    events = [json.loads(line[6:]) for line in streamed.split("\n\n") if line]
    assert (answer["tokens"], answer["warnings"]) == (4, ["frob was ignored"])
    assert answer["id"].startswith("plain-")
    assert len("".join(event["text"] for event in events)) == len(answer["text"]) == 4
    assert events[-1]["end"] == "length"


async def test_a_new_dialects_refusals_name_its_own_fields(url: str) -> None:
    answers = [
        await post(f"{url}/plain", body)
        for body in ({"text": 5}, {"text": "a", "length": 2, "stream": 1}, {"text": "a" * 100})
    ]

    assert [(status, json.loads(text)["error"]["param"]) for status, text in answers] == [
        (400, "text"),
        (400, "stream"),
        (400, "text"),
    ]


async def test_a_new_endpoint_counts_tokens(url: str) -> None:
    assert json.loads((await post(f"{url}/count", {"text": "abc"}))[1]) == {"count": 3}
    assert (await post(f"{url}/count", {"text": "abc", "model": "other"}))[0] == 404


def test_a_new_architecture_reads_its_config_and_names_its_tensors() -> None:
    family = example("An architecture of the Llama shape")["PLUME"]
    values = {
        **TINY_CONFIGS["llama"],
        "model_type": "plume",
        "architectures": ["PlumeForCausalLM"],
        "use_qk_norm": True,
    }

    config = family.read_config(values)
    targets = family.weight_targets(config)

    assert config.qk_norm
    assert targets["model.layers.0.self_attn.qkv_proj.weight"].shape[0] == config.q_size + 2 * config.kv_size
    assert {"model.output.weight", "model.layers.0.self_attn.q_norm.weight"} < targets.keys()
