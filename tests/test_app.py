"""An application that owns its engines: made from a config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestServer

from brlite.app import create_app
from brlite.config.options import Config, EngineConfig, LimitsConfig, ModelSpec
from brlite.errors import ConfigError, ModelError
from brlite.server.generate import MODELS

TOYS = Config(engine=EngineConfig(name="toy"), model=(ModelSpec(name="one"), ModelSpec(name="two")))


async def test_an_application_of_a_config_loads_its_models_and_closes_them() -> None:
    app = create_app(TOYS)
    async with TestServer(app, host="127.0.0.1") as server, aiohttp.ClientSession() as session:
        engines = [model.engine for model in app[MODELS]]
        body = {"model": "two", "prompt": "hello", "max_tokens": 9}
        async with session.post(server.make_url("/v1/completions"), json=body) as response:
            answer = await response.json()

    assert answer["choices"][0]["text"] == "hello"
    assert [engine is not None and engine.is_running for engine in engines] == [False, False]
    assert None not in engines


async def test_an_application_whose_model_cannot_be_loaded_does_not_start(tmp_path: Path) -> None:
    config = Config(model=(ModelSpec(name="gone", path=str(tmp_path / "nowhere")),))

    with pytest.raises(ModelError, match="nowhere does not exist"):
        await TestServer(create_app(config), host="127.0.0.1").start_server()


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (Config(engine=EngineConfig(name="toy"), limits=LimitsConfig(max_waiting=-1)), "limits.max_waiting"),
        (Config(engine=EngineConfig(name="toy", block_size="16")), "engine.block_size"),
        (Config(engine=EngineConfig(name="toy"), model=(ModelSpec(name="a"), ModelSpec(name="a"))), "model"),
        (
            Config(model=tuple(ModelSpec(name=name, tensor_parallel=2) for name in "ab")),
            "tensor_parallel = 2: only one",
        ),
        (Config(server=object()), "allowed are text, numbers"),  # type: ignore[arg-type]
    ],
)
def test_a_config_that_was_made_in_python_is_checked_like_a_file(config: Config, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        create_app(config)


def test_a_config_that_was_made_in_python_may_have_path_objects(tmp_path: Path) -> None:
    spec = ModelSpec(name="one", path=tmp_path)  # type: ignore[arg-type]

    app = create_app(Config(model=(spec,)))

    assert [model.spec.path for model in app[MODELS]] == [str(tmp_path)]


def test_a_second_config_is_refused() -> None:
    with pytest.raises(TypeError, match="no second config"):
        create_app(TOYS, TOYS)


def test_what_is_neither_a_config_nor_an_engine_is_refused() -> None:
    path: Any = "models/one"

    with pytest.raises(TypeError, match="got str"):
        create_app(path)
