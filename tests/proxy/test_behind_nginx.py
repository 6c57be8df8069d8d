"""The manual's set-up for several models: a service of each, and an nginx before them that looks at no request.

nginx is Debian's, its configuration the manual's, word for word but for the addresses. Whichever service it picks, the
one that has the model answers. The last test has the configuration of docs/deployment.md, with TLS.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import openai
import pytest
from aiohttp import ClientSession, HttpVersion10

from tests.conftest import Eventually
from tests.limits import PATIENCE_SECONDS
from tests.proxy.conftest import Connect
from tests.proxy.services import GATED, LONG, Gated, Service, ask, free_port, served, start_as_in_the_manual
from tests.proxy.test_tls import MAKE_CERTIFICATE

MANUALS_CONF = """
# port3为nginx监听端口
upstream brvllm_server {
    server host_ip1:port1;
    server host_ip2:port2;
}

server {
    listen port3;

    location /v1 {
        proxy_pass http://brvllm_server;
        proxy_set_header Host $host;
        proxy_set_header X-Real-IP $remote_addr;
        proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
    }
}
"""
# What Debian's /etc/nginx/nginx.conf says around it, as little as one of our own needs that anybody may start.
OWN_CONF = """
daemon off;
master_process off;
pid nginx.pid;
error_log stderr;
events {}
http {
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include brvllm.conf;
}
"""
MODELS = ("a", "b")
PLACEHOLDERS = {"http://{主机IP}:{端口号}": "c", "http://host_ip:port": "d"}  # as the manual's table has them
NUM_FOR_EACH = 6  # of one kind to one model: nginx takes turns, so each service gets three of them


DOCS_CONF = re.search(
    r"```nginx\n(.*?)```", (Path(__file__).parents[2] / "docs" / "deployment.md").read_text(encoding="utf-8"), re.DOTALL
)


@contextmanager
def nginx_before(folder: Path, *urls: str) -> Iterator[str]:
    """The address of an nginx before two services, while inside."""
    port, conf = free_port(), MANUALS_CONF
    for number, url in enumerate(urls, 1):
        conf = conf.replace(f"host_ip{number}:port{number}", url.removeprefix("http://"))
    with nginx(folder, conf.replace("port3;", f"127.0.0.1:{port};"), port):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def nginx(folder: Path, conf: str, port: int) -> Iterator[None]:
    """An nginx with the `server` of `conf`, which listens to `port`, while inside. Its files are in `folder`."""
    program = shutil.which("nginx", path=os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/usr/local/sbin")))
    if program is None:
        pytest.skip("nginx is not installed; on Debian: apt-get install nginx")
    (folder / "brvllm.conf").write_text(conf)
    (folder / "nginx.conf").write_text(OWN_CONF)
    process = subprocess.Popen([program, "-p", folder, "-c", folder / "nginx.conf"])
    try:
        wait_listening(port, process)
        yield
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE_SECONDS)


def wait_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)


@contextmanager
def two_services(
    folder: Path, ports: tuple[int, int] | None = None, **elsewhere: dict[str, str]
) -> Iterator[tuple[Service, Service]]:
    """The services of the models `a` and `b`, which know of each other; `elsewhere` is what one is told besides."""
    ports = ports or (free_port(), free_port())
    both = {f"http://127.0.0.1:{port}": model for model, port in zip(MODELS, ports, strict=True)}
    with ExitStack() as stack:
        services = []
        for model, port in zip(MODELS, ports, strict=True):
            service = start_as_in_the_manual(folder, model, port, {**both, **elsewhere.get(model, {})})
            stack.callback(service.stop)
            services.append(service)
        for service in services:
            service.wait_ready()
        yield services[0], services[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("services")


@pytest.fixture(scope="module")
def services(folder: Path) -> Iterator[tuple[Service, Service]]:
    with two_services(folder, a=PLACEHOLDERS) as services:
        yield services


@pytest.fixture(scope="module")
def url(folder: Path, services: tuple[Service, Service]) -> Iterator[str]:
    with nginx_before(folder, *(service.url for service in services)) as url:
        yield url


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """The `cert.pem` of `localhost`, with its `key.pem` beside it."""
    subprocess.run(MAKE_CERTIFICATE, cwd=tmp_path, check=True, capture_output=True)
    return tmp_path / "cert.pem"


@pytest.fixture
def client(url: str, connect: Connect) -> openai.AsyncOpenAI:
    return connect(url)


async def test_every_request_is_answered_by_its_model_whichever_service_nginx_picks(
    services: tuple[Service, Service], client: openai.AsyncOpenAI, connect: Connect, eventually: Eventually
) -> None:
    said = {
        (model, is_chat): await ask(connect(service.url), model, is_chat=is_chat)
        for model, service in zip(MODELS, services, strict=True)
        for is_chat in (False, True)
    }

    answers = [
        (model, is_chat, await ask(client, model, is_chat=is_chat, is_stream=is_stream))
        for is_stream in (False, True)
        for model, is_chat in said
        for _ in range(NUM_FOR_EACH)
    ]

    assert len(answers) == 48
    assert len(set(said.values())) == 4
    assert [text for _, _, text in answers] == [said[model, is_chat] for model, is_chat, _ in answers]
    a, b = services  # half of the requests for each came by the other, as its access lines say
    await eventually(lambda: len(a.requests("model=b", "200")) == len(b.requests("model=a", "200")) == 12)


async def test_both_services_list_both_models(services: tuple[Service, Service], client: openai.AsyncOpenAI) -> None:
    lists = [(await client.models.list()).data for _ in services]

    assert [{model.id for model in models} for models in lists] == [set(MODELS)] * 2


async def test_a_client_that_leaves_a_stream_aborts_it_at_the_far_service(
    services: tuple[Service, Service], client: openai.AsyncOpenAI, eventually: Eventually
) -> None:
    near, far = services
    num_generated = far.metric("vllm:generation_tokens_total")

    for _ in services:  # nginx gives one to the model's own service, and one to the other
        async with await client.completions.create(model="b", stream=True, **LONG) as stream:
            await anext(stream)

    await eventually(lambda: bool(near.requests("model=b", "499")))
    await eventually(lambda: far.metric("vllm:num_requests_running") == 0)
    assert far.metric("vllm:generation_tokens_total") - num_generated < LONG["max_tokens"]


async def test_a_client_that_waits_no_longer_aborts_its_request_at_the_far_service(
    services: tuple[Service, Service], client: openai.AsyncOpenAI, eventually: Eventually
) -> None:
    _, far = services
    num_generated = far.metric("vllm:generation_tokens_total")

    waiting = [asyncio.create_task(client.completions.create(model="b", **LONG)) for _ in services]
    await eventually(lambda: far.metric("vllm:num_requests_running") == 2)
    for task in waiting:
        task.cancel()

    await eventually(lambda: far.metric("vllm:num_requests_running") == 0)
    assert far.metric("vllm:generation_tokens_total") - num_generated < LONG["max_tokens"]


async def test_a_foreign_services_stream_arrives_event_by_event(tmp_path: Path, connect: Connect) -> None:
    foreign = Gated("c")
    async with foreign.listening() as address:
        table = {address: "c"}
        with (
            two_services(tmp_path, a=table, b=table) as services,
            nginx_before(tmp_path, *(service.url for service in services)) as url,
        ):
            stream = await connect(url).completions.create(model="c", prompt="Hi", stream=True)
            received = []
            async for event in stream:
                received.append(event.choices[0].text)
                foreign.gate.release()

    assert received == GATED


async def test_nginx_asks_in_http_1_0_as_the_manual_configures_it(tmp_path: Path, connect: Connect) -> None:
    service = Gated("c", is_open=True)
    async with service.listening() as address:
        with nginx_before(tmp_path, address, address) as url:
            await ask(connect(url), "c", is_stream=True)

    assert [(asked.version, asked.headers["Connection"]) for asked in service.requests] == [(HttpVersion10, "close")]


async def test_without_its_service_a_model_is_a_clear_error_and_the_other_one_is_unharmed(
    tmp_path: Path, connect: Connect
) -> None:
    with (
        two_services(tmp_path) as services,
        nginx_before(tmp_path, *(service.url for service in services)) as url,
    ):
        client = connect(url)
        said = await ask(client, "a")
        services[1].kill()

        errors = [await refusal(client, "b") for _ in range(4)]
        answers = [await ask(client, "a", is_stream=is_stream) for is_stream in (False, True) * 2]

    assert {(error.status_code, error.code, error.type) for error in errors} == {
        (503, "upstream_unavailable", "server_error")
    }
    assert answers == [said] * 4


async def test_services_that_send_each_other_for_a_model_end_it_at_once(tmp_path: Path, connect: Connect) -> None:
    ports = free_port(), free_port()
    a, b = (f"http://localhost:{port}" for port in ports)  # other names for what the table has already
    with two_services(tmp_path, ports, a={b: "lost", a: "mine"}, b={a: "lost"}) as services:
        client = connect(services[0].url)

        errors = [await refusal(client, model) for model in ("lost", "mine")]

        await ask(client, "a")  # what goes on behind the answers would be there before this one
        num_requests = [len(service.requests("508")) for service in services]

    assert [(error.status_code, error.code) for error in errors] == [(508, "loop_detected")] * 2
    assert num_requests == [2 + 2, 1 + 0]  # the client's, and the same come back: from b, from a itself


async def test_placeholders_for_an_address_are_warned_about_and_never_dialled(
    services: tuple[Service, Service], connect: Connect
) -> None:
    client = connect(services[0].url)

    errors = [await refusal(client, model) for model in ("c", "d")]
    listed = {model.id for model in (await client.models.list()).data}

    assert [(error.status_code, error.code) for error in errors] == [(404, "model_not_found")] * 2
    assert listed == set(MODELS)
    warnings = [line for line in services[0].log.splitlines() if " WARNING " in line]
    assert len(warnings) == 2
    assert all(url in line for url, line in zip(PLACEHOLDERS, warnings, strict=True))


async def test_the_nginx_of_the_docs_has_tls_and_forwards_a_stream_event_by_event(
    tmp_path: Path, certificate: Path
) -> None:
    assert DOCS_CONF is not None
    port, conf = free_port(), DOCS_CONF[1]
    foreign, toml = Gated("c"), '[server]\nport = {port}\n\n[[upstream]]\nurl = "{url}"\nmodels = ["c"]\n'
    async with foreign.listening() as address:
        with served(tmp_path, "brlite", toml, url=address) as service:
            for theirs, ours in {
                "listen 443": f"listen 127.0.0.1:{port}",
                "/etc/ssl/llm.pem": str(certificate),
                "/etc/ssl/llm.key": str(certificate.with_name("key.pem")),
                "http://127.0.0.1:8000": service.url,
            }.items():
                assert theirs in conf
                conf = conf.replace(theirs, ours)
            trusted = ssl.create_default_context(cafile=str(certificate))
            body = {"model": "c", "prompt": "Hi", "stream": True}
            received = []
            with nginx(tmp_path, conf, port):
                async with (
                    ClientSession() as session,
                    session.post(f"https://localhost:{port}/v1/completions", json=body, ssl=trusted) as answer,
                ):
                    async for line in answer.content:
                        if line.startswith(b"data: {"):
                            received.append(json.loads(line[6:])["choices"][0]["text"])
                            foreign.gate.release()

    assert received == GATED


async def refusal(client: openai.AsyncOpenAI, model: str) -> openai.APIStatusError:
    """The error that asking for the model ends with."""
    with pytest.raises(openai.APIStatusError) as caught:
        await ask(client, model)
    return caught.value
