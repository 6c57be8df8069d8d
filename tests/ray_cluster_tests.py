"""brlite on Ray Serve. One real cluster with a tiny model serves all tests.

Ray takes the machine's own address and dials others, whatever it is told. So `test_ray_serve.py` runs this file in a
network namespace that has only loopback. It is not collected by itself.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from tests.limits import PATIENCE_SECONDS
from tests.tiny_models import write_byte_tokenizer, write_tiny_model

pytestmark = pytest.mark.ray

SCRIPT = Path(__file__).with_name("ray_cluster.py")
CONFIG = """
[server]
drain_seconds = 5.0
[engine]
threads = 1
[[model]]
name = "tiny"
path = "{path}"
build_seq = 128
build_batch = 1
"""
# One sequence at a time: seconds of work.
LONG = {"model": "tiny", "prompt": "abc", "max_tokens": 60, "n": 128, "ignore_eos": True}
SHORT: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 8, "temperature": 0}


class Cluster:
    """The program `ray_cluster.py`, in a session of its own by which all processes of the cluster are known."""

    def __init__(self, config: Path, temporary: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "RAY_TMPDIR": temporary,
            "RAY_AUTH_TOKEN": secrets.token_hex(32),  # or Ray writes one into the home folder
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "brlite.ray_serve:proxy_middlewares",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(port), str(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def wait_for(self, word: str) -> None:
        assert self.process.stdout is not None
        assert any(line == f"{word}\n" for line in self.process.stdout), "the cluster ended"

    def kill_replicas(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("kill\n")
        self.process.stdin.flush()
        self.wait_for("killed")

    def stop(self) -> list[int]:
        """End the cluster. Returns what it left behind, which is killed."""
        try:
            self.process.communicate(timeout=PATIENCE_SECONDS)
            return self.processes()
        finally:
            for pid in self.processes():
                os.kill(pid, signal.SIGKILL)
            self.process.wait()

    def processes(self) -> list[int]:
        everybody = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        return [pid for pid in everybody if session_of(pid) == self.process.pid]


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module", autouse=True)
def _loopback_is_all_there_is() -> None:
    if [name for _, name in socket.if_nameindex()] != ["lo"]:
        pytest.skip("Ray is started only where there is no network but loopback: see test_ray_serve.py")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model = write_tiny_model(tmp_path_factory.mktemp("model"))
    write_byte_tokenizer(model)
    config = model / "brlite.toml"
    config.write_text(CONFIG.format(path=model))
    # Not pytest's folder: the paths of Ray's sockets must fit into 107 bytes.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as temporary:
        cluster = Cluster(config, temporary)
        try:
            cluster.wait_for("ready")
            yield cluster
        finally:
            left = cluster.stop()
    assert left == []


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_SECONDS) as client:
        yield client


async def scrape(session: aiohttp.ClientSession, cluster: Cluster) -> dict[str, float]:
    """The metrics of the application that has one replica, by name and labels."""
    async with session.get(f"{cluster.url}/alone/metrics") as answer:
        text = await answer.text()
    return {name: float(value) for name, value in re.findall(r"^([^#\s].*) (\S+)$", text, re.MULTILINE)}


def num_running(metrics: dict[str, float]) -> float:
    return metrics['vllm:num_requests_running{model_name="tiny"}']


def num_aborted(metrics: dict[str, float]) -> float:
    return metrics['vllm:request_success_total{engine="0",finished_reason="abort",model_name="tiny"}']


def test_the_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    whole = client.completions.create(**SHORT)

    with client.completions.create(**SHORT, stream=True) as stream:
        chunks = list(stream)

    assert len(chunks) > 2
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_a_refusal_is_in_our_words_and_names_the_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**SHORT, top_p=2)

    assert caught.value.param == "top_p"
    assert caught.value.type == "invalid_request_error"


async def test_a_path_and_its_query_arrive_as_they_were_sent(cluster: Cluster) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{cluster.url}/alone/v1/models/a%3Fb%20c?d=%20") as answer:
            named = await answer.json()
        async with session.get(f"{cluster.url}//example.com/v1") as answer:
            elsewhere = await answer.json()

    assert "`a?b c`" in named["error"]["message"]
    assert elsewhere["error"]["code"] == "unknown_url"


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/version", "/alone/health", "/alone/metrics"])
async def test_every_path_is_that_of_the_server(cluster: Cluster, path: str) -> None:
    async with aiohttp.ClientSession() as session, session.get(cluster.url + path) as answer:
        body = await answer.read()

    assert answer.status == 200
    assert body
    assert len(answer.headers.getall("x-request-id")) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_ends_its_work(cluster: Cluster, stream: bool) -> None:
    async with aiohttp.ClientSession() as session:
        aborted_before = num_aborted(await scrape(session, cluster))
        asking = asyncio.ensure_future(
            session.post(f"{cluster.url}/alone/v1/completions", json=LONG | {"stream": stream})
        )
        while not num_running(await scrape(session, cluster)):
            pass

        if stream:
            (await asking).close()
        else:
            asking.cancel()

        while num_running(metrics := await scrape(session, cluster)):
            pass
        assert num_aborted(metrics) == aborted_before + 1


async def test_what_replicas_were_killed_over_ends_with_our_errors(cluster: Cluster) -> None:
    url = f"{cluster.url}/alone/v1/completions"
    async with aiohttp.ClientSession() as session:
        plain = asyncio.ensure_future(session.post(url, json=LONG))
        async with session.post(url, json=LONG | {"stream": True}) as answer:
            begin = await answer.content.readuntil(b"\n\n")
            while num_running(await scrape(session, cluster)) < 1:
                pass

            await asyncio.to_thread(cluster.kill_replicas)

            *_, event, done, rest = (begin + await answer.read()).split(b"\n\n")
        async with await plain as failed:
            body = await failed.json()

    assert json.loads(event.removeprefix(b"data: "))["error"]["type"] == "server_error"
    assert (done, rest) == (b"data: [DONE]", b"")
    assert failed.status == 500
    assert body["error"]["type"] == "server_error"


def test_ray_has_no_connection_that_is_not_on_loopback(cluster: Cluster) -> None:
    addresses = {address for table in ("tcp", "tcp6", "udp", "udp6") for address in remote_addresses(table)}

    assert any(address.is_loopback for address in addresses)
    assert [str(address) for address in addresses if not (address.is_loopback or address.is_unspecified)] == []


def remote_addresses(table: str) -> Iterator[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """The other sides of this namespace's sockets. The kernel writes words of four bytes in the machine's order."""
    for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
        words = bytes.fromhex(line.split()[2].partition(":")[0])
        address = ipaddress.ip_address(b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4)))
        yield getattr(address, "ipv4_mapped", None) or address


def test_when_all_replicas_are_killed_others_take_their_place(cluster: Cluster, client: openai.OpenAI) -> None:
    before = client.completions.create(**SHORT)

    cluster.kill_replicas()

    assert ask_until_served(client).choices[0].text == before.choices[0].text


def ask_until_served(client: openai.OpenAI) -> openai.types.Completion:
    while True:
        try:
            return client.completions.create(**SHORT)
        except openai.InternalServerError:  # it was on its way to a replica that Serve did not yet know to be dead
            continue
