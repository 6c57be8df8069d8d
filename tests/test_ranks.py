"""Models that several processes compute, served by the real command: what they say, and what comes when one dies."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import openai
import pytest

from brlite.config.options import Config, EngineConfig, ModelSpec
from brlite.llm import LLM
from brlite.sampling_params import SamplingParams
from tests.limits import PATIENCE_SECONDS
from tests.processes import is_alive, wait_gone
from tests.rank_servers import BRLITE, RankServer, serving, wait_status, write_manual_config, write_model

PROMPT = "描述一下夏天"
NUM_TOKENS = 24
LONG = {"model": "llama", "prompt": PROMPT, "max_tokens": 60, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module", params=["native", "torch"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(model: Path, backend: str) -> Iterator[RankServer]:
    config = write_manual_config(model.parent, model, ranks=2)
    with serving(*BRLITE, "serve", str(config), "--port", "0", "--threads", "2", BRLITE_ENGINE=backend) as server:
        yield server
        assert server.stop() == 0


def test_two_ranks_of_the_manuals_config_say_what_one_process_says(
    server: RankServer, model: Path, backend: str
) -> None:
    spec = ModelSpec(name="llama", path=str(model), build_seq=128)
    with LLM(config=Config(model=(spec,), engine=EngineConfig(backend=backend, threads=1))) as llm:
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
        expected = llm.generate(PROMPT, params)[0].outputs[0].text

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        whole = client.completions.create(
            model="llama", prompt=PROMPT, temperature=0, max_tokens=NUM_TOKENS, extra_body={"ignore_eos": True}
        )
        with client.completions.create(
            model="llama",
            prompt=PROMPT,
            temperature=0,
            max_tokens=NUM_TOKENS,
            stream=True,
            extra_body={"ignore_eos": True},
        ) as stream:
            streamed = "".join(chunk.choices[0].text for chunk in stream)

    assert len(server.rank_pids()) == 1
    assert whole.choices[0].text == streamed == expected


def test_a_killed_rank_ends_the_streams_with_an_error_and_the_model_comes_back(server: RankServer) -> None:
    rank = server.rank_pids()[0]

    async def die_amid_a_stream() -> str:
        async with aiohttp.ClientSession(server.url) as session:
            os.kill(rank, signal.SIGSTOP)  # so that the step cannot end before the rank does
            async with session.post("/v1/completions", json=LONG | {"stream": True}) as response:
                os.kill(rank, signal.SIGKILL)
                text = await response.text()
            await wait_status(session, "/ready", 503)
            await wait_status(session, "/ready", 200)
            async with session.post("/v1/completions", json=LONG) as response:
                assert (await response.json())["usage"]["completion_tokens"] == LONG["max_tokens"]
        return text

    text = asyncio.run(die_amid_a_stream())

    assert '"type":"server_error"' in text
    assert text.rstrip().endswith("data: [DONE]")
    assert not is_alive(rank)
    assert len(server.rank_pids()) == 1


def test_no_rank_outlives_a_server_that_is_killed(model: Path, backend: str) -> None:
    config = write_manual_config(model.parent, model, ranks=3)
    command = (*BRLITE, "serve", str(config), "--port", "0", "--threads", "3")
    with serving(*command, BRLITE_ENGINE=backend) as server:
        ranks = server.rank_pids()

        server.process.kill()

        assert len(ranks) == 2
        wait_gone(ranks)


def test_a_rank_that_dies_between_two_steps_ends_the_server_if_it_is_told_so(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "brlite.toml"
    config.write_text(
        f'[engine]\non_rank_failure = "exit"\nthreads = 2\n[[model]]\nname = "llama"\npath = "{model}"\n'
        "build_seq = 128\ntensor_parallel = 2\ndevices = [0, 1]\n"
    )
    with serving(*BRLITE, "serve", str(config), "--port", "0") as server:
        (rank,) = server.rank_pids()

        os.kill(rank, signal.SIGKILL)

        assert server.wait_for(r"stopping: (.*)") == 'model llama is lost, and engine.on_rank_failure is "exit"'
        assert server.process.wait(PATIENCE_SECONDS) == 1


@pytest.mark.torch
def test_torchrun_starts_ranks_that_find_each_other(model: Path) -> None:
    config = write_manual_config(model.parent, model, ranks=2)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python")
    with serving(*torchrun, *BRLITE, "worker", str(config), "--port", "0") as server:

        async def ask() -> int:
            async with (
                aiohttp.ClientSession(server.url) as session,
                session.post("/v1/completions", json=LONG) as response,
            ):
                tokens: int = (await response.json())["usage"]["completion_tokens"]
                return tokens

        assert asyncio.run(ask()) == LONG["max_tokens"]
        ranks = server.rank_pids()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(PATIENCE_SECONDS)
        wait_gone(ranks)
