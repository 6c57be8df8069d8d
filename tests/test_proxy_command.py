"""`brlite proxy` as a process: what it imports, and that its config changes under running streams."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import openai
import pytest

from tests.config.test_manual_json import FIXTURES
from tests.conftest import Eventually
from tests.limits import PATIENCE_SECONDS
from tests.proxy.services import GATED, Gated, Service, ask, free_port

HEAVY = ("torch", "tokenizers", "transformers", "numpy", "safetensors", "gguf", "sentencepiece", "jinja2")
RUN = "import sys; from brlite.commands.cli import main; x = main(sys.argv[1:]); print(*sys.modules); sys.exit(x)"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "proxy.toml"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """`start(…)` runs `brlite proxy …` until the test ends; it must leave in good order."""
    services: list[Service] = []

    def run(*arguments: str) -> Service:
        port = free_port()
        url, log = f"http://127.0.0.1:{port}", tmp_path / f"{len(services)}.log"
        service = Service(url, log, "brlite", "proxy", *arguments, "--port", str(port))
        services.append(service)
        service.wait_ready()
        return service

    yield run
    for service in services:
        service.stop()


@asynccontextmanager
async def client_of(service: Service) -> AsyncIterator[openai.AsyncOpenAI]:
    url = f"{service.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_SECONDS) as client:
        yield client


def write(path: Path, url: str, model: str) -> None:
    """A proxy's config with one upstream."""
    path.write_text(f'[[upstream]]\nurl = "{url}"\nmodels = ["{model}"]\nhealth_path = ""\n')


def test_a_proxy_that_listens_has_imported_nothing_heavy() -> None:
    command = [sys.executable, "-c", RUN, "proxy", "--upstream", "a=http://127.0.0.1:9", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None

    said = next(line for line in process.stderr if "listening on" in line)
    next(line for line in process.stderr if "curl -N" in line)
    process.send_signal(signal.SIGTERM)
    modules, _ = process.communicate(timeout=PATIENCE_SECONDS)

    assert said.rstrip().endswith("; forwarding: a → http://127.0.0.1:9")
    assert process.returncode == 0
    assert "brlite.proxy.forwarder" in modules.split()
    assert set(HEAVY).isdisjoint(modules.split())


async def test_models_that_are_named_on_the_command_line_are_forwarded(start: Callable[..., Service]) -> None:
    async with Gated("org/a", is_open=True).listening() as url:
        service = start("--upstream", f"org/a={url}")
        async with client_of(service) as client:
            said = await ask(client, "org/a", is_stream=True)

    assert said == "".join(GATED)


async def test_the_manuals_pair_of_files_makes_a_proxy(tmp_path: Path, start: Callable[..., Service]) -> None:
    models = {"manual_qwen1.5_14b": "Qwen/Qwen1.5-14B-Chat", "manual_codellama_34b": "codellama/CodeLlama-34b-hf"}
    qwen, llama = (Gated(model, is_open=True) for model in models.values())
    async with qwen.listening() as qwen_url, llama.listening() as llama_url:
        for name in models:
            text = (FIXTURES / f"{name}.json").read_text()
            text = text.replace("http://host_ip1:port1", qwen_url).replace("http://host_ip2:port2", llama_url)
            (tmp_path / f"{name}.json").write_text(text)
        service = start(*(str(tmp_path / f"{name}.json") for name in models))
        async with client_of(service) as client:
            said = [await ask(client, model, is_stream=True) for model in models.values()]

    assert said == ["".join(GATED)] * 2
    assert (len(qwen.requests), len(llama.requests)) == (1, 1)


async def test_a_stream_goes_on_while_sighup_takes_its_upstream_away(
    config: Path, start: Callable[..., Service], eventually: Eventually
) -> None:
    old, new = Gated("a"), Gated("b", is_open=True)
    async with old.listening() as old_url, new.listening() as new_url:
        write(config, old_url, "a")
        service = start(str(config))
        async with client_of(service) as client:
            stream = await client.completions.create(model="a", prompt="Hi", stream=True)
            texts = [(await anext(stream)).choices[0].text]
            write(config, new_url, "b")
            service.process.send_signal(signal.SIGHUP)
            await eventually(lambda: "config: + upstream" in service.log)

            said = await ask(client, "b", is_stream=True)
            with pytest.raises(openai.NotFoundError):
                await ask(client, "a")
            for _ in GATED:
                old.gate.release()
            texts += [event.choices[0].text async for event in stream]

    assert said == "".join(GATED)
    assert texts == GATED
    assert f"config: - upstream {old_url}" in service.log


async def test_a_broken_config_is_named_and_the_proxy_goes_on(
    config: Path, start: Callable[..., Service], eventually: Eventually
) -> None:
    async with Gated("a", is_open=True).listening() as url:
        write(config, url, "a")
        service = start(str(config))
        write(config, "nowhere", "a")
        service.process.send_signal(signal.SIGHUP)
        await eventually(lambda: "the config stays as it was" in service.log)
        async with client_of(service) as client:
            said = await ask(client, "a", is_stream=True)

    assert said == "".join(GATED)
    assert f'{config}: upstream[0].url = "nowhere": allowed is http://HOST[:PORT]' in service.log


async def test_sigterm_lets_a_forwarded_stream_end_and_takes_no_new_one(
    config: Path, start: Callable[..., Service], eventually: Eventually
) -> None:
    old = Gated("a")
    async with old.listening() as url:
        service = start("--upstream", f"a={url}")
        async with client_of(service) as client, aiohttp.ClientSession() as session:
            stream = await client.completions.create(model="a", prompt="Hi", stream=True)
            texts = [(await anext(stream)).choices[0].text]
            service.process.send_signal(signal.SIGTERM)
            await eventually(lambda: "stopping: running requests have" in service.log)
            with pytest.raises(aiohttp.ClientConnectionError):
                await session.get(f"{service.url}/health")
            for _ in GATED:
                old.gate.release()
            texts += [event.choices[0].text async for event in stream]
        status = await asyncio.to_thread(service.process.wait, 30)

    assert texts == GATED
    assert status == 0
