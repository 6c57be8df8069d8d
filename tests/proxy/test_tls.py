"""Upstreams behind TLS: one whose certificate a configured authority has signed is asked, any other is not."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import openai
import pytest

from brlite.app import create_app, fast_paths
from brlite.config.options import Config, ProxyConfig, UpstreamConfig
from brlite.errors import ConfigError, UpstreamError
from brlite.http.listen import HttpServer
from brlite.proxy import attempt
from brlite.proxy.forwarder import Forwarder
from brlite.proxy.routing.client import UpstreamClient
from brlite.proxy.routing.upstream import Upstream
from brlite.server.served_model import ModelTable
from tests.limits import PATIENCE_SECONDS
from tests.proxy.conftest import Connect
from tests.proxy.proxies import run_proxy
from tests.proxy.raw_client import Client, post
from tests.proxy.scripts import GOOD_PLAIN
from tests.proxy.services import GATED, Gated, ask

AIOHTTP_IMPORTED_BY_A_SERVER = """
import asyncio, ssl, sys
from brlite.http.certificates import certificates_read_late

with certificates_read_late():
    import aiohttp

contexts = [each for each in vars(aiohttp.connector).values() if isinstance(each, ssl.SSLContext)]
print(len(contexts), *[len(each.get_ca_certs()) for each in contexts])

async def ask():
    async with aiohttp.ClientSession() as session:
        for _ in range(2):
            try:
                async with session.get(sys.argv[1]) as response:
                    print("answered")
            except aiohttp.ClientConnectorCertificateError:
                print("not trusted")

asyncio.run(ask())
print(len(ssl.create_default_context().get_ca_certs()))
"""

CUT_HANDSHAKE = "it closed the connection in the TLS handshake"

# fmt: off
MAKE_CERTIFICATE = [
    "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
    "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "cert.pem",
]
# fmt: on


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `cert.pem` is, a certificate for the name `localhost` that has signed itself, and its `key.pem`."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(MAKE_CERTIFICATE, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
async def port(folder: Path) -> AsyncIterator[int]:
    """Where the upstream listens, under any name of this machine. Its model is `far`."""
    async with Gated("far", is_open=True).listening(tls_context(folder)) as address:
        yield int(address.rpartition(":")[2])


def tls_context(folder: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


@asynccontextmanager
async def proxy(url: str, ca_file: Path | None) -> AsyncIterator[str]:
    """The address of a proxy for this upstream, while inside."""
    upstream = UpstreamConfig(url=url, models=("far",), ca_file=str(ca_file) if ca_file else None, health_path="")
    config = Config(model=(), upstream=(upstream,))
    app = create_app(ModelTable([]), config)
    async with HttpServer(app, "127.0.0.1", 0, config.limits, 0.2, fast_paths(app)) as server:
        yield server.url


async def test_an_upstream_with_a_trusted_certificate_is_asked(folder: Path, port: int, connect: Connect) -> None:
    async with proxy(f"https://localhost:{port}", folder / "cert.pem") as url:
        said = await ask(connect(url), "far", is_stream=True)

    assert said == "".join(GATED)


@pytest.mark.parametrize(
    ("host", "is_trusted", "why"),
    [("localhost", False, "self-signed certificate"), ("127.0.0.1", True, "IP address mismatch")],
    ids=["a stranger's certificate", "another's certificate"],
)
async def test_an_upstream_whose_certificate_is_not_good_is_not_asked(
    folder: Path,
    port: int,
    connect: Connect,
    caplog: pytest.LogCaptureFixture,
    host: str,
    is_trusted: bool,
    why: str,
) -> None:
    caplog.set_level(logging.WARNING)

    async with proxy(f"https://{host}:{port}", folder / "cert.pem" if is_trusted else None) as url:
        with pytest.raises(openai.InternalServerError) as caught:
            await ask(connect(url), "far")

    assert (caught.value.status_code, caught.value.code) == (503, "upstream_unavailable")
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith(f"upstream https://{host}:{port}: ")
    assert why in line
    assert why not in caught.value.message


@pytest.mark.parametrize("is_orderly", [True, False], ids=["close_notify", "the end of the connection alone"])
async def test_a_request_that_was_read_on_a_kept_connection_is_not_sent_again(folder: Path, is_orderly: bool) -> None:
    num_read = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_read
        for answer in (GOOD_PLAIN, b""):  # the second is an orderly end
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))
            num_read += 1
            writer.write(answer)
        writer.close() if is_orderly else writer.transport.abort()

    server = await asyncio.start_server(serve, "localhost", 0, ssl=tls_context(folder))
    async with server, proxy(f"https://localhost:{server.sockets[0].getsockname()[1]}", folder / "cert.pem") as url:
        client = await Client.connect(int(url.rpartition(":")[2]))
        answers = []
        for _ in range(2):
            client.send(post({"model": "far"}))
            answers.append(await client.answer())
        client.leave()

    assert [answer.status for answer in answers] == [200, 502]
    assert num_read == 2


@pytest.mark.parametrize("is_reset", [True, False])
async def test_a_kept_connection_that_had_been_closed_is_not_used_however_late_that_is_seen(
    folder: Path, is_reset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "STALE_SECONDS", 0.0)  # each loss is seen too late
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE_SECONDS)

        def answer_one() -> ssl.SSLSocket:
            peer = tls_context(folder).wrap_socket(listener.accept()[0], server_side=True)
            assert peer.recv(65536).startswith(b"POST ")
            peer.sendall(GOOD_PLAIN)
            return peer

        url = f"https://localhost:{listener.getsockname()[1]}"
        config = UpstreamConfig(url=url, models=("far",), ca_file=str(folder / "cert.pem"), health_path="")
        async with run_proxy(config) as proxy:
            client = await Client.connect(proxy.port)
            client.send(post({"model": "far"}))
            peer, first = await asyncio.gather(asyncio.to_thread(answer_one), client.answer())

            if is_reset:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()
            next(iter(proxy.server._connections._members)).data_received(
                post({"model": "far"})
            )  # before the loop sees the end
            again, second = await asyncio.gather(asyncio.to_thread(answer_one), client.answer())
            again.close()
            client.leave()

    assert [answer.status for answer in (first, second)] == [200, 200]


@pytest.mark.parametrize("is_checked", [False, True], ids=["a request", "a health check"])
async def test_a_handshake_that_is_cut_is_named_in_the_log(
    folder: Path, is_checked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    async with await asyncio.start_server(close, "127.0.0.1", 0) as server:
        upstream = UpstreamConfig(url=f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}", models=("far",))
        if is_checked:
            async with UpstreamClient(Upstream(upstream, ProxyConfig()), 5) as client:
                with pytest.raises(UpstreamError, match=CUT_HANDSHAKE):
                    await client.status("/health")
        else:
            async with run_proxy(msgspec.structs.replace(upstream, health_path="")) as proxy:
                client = await Client.connect(proxy.port)
                client.send(post({"model": "far"}))
                assert (await client.answer()).status == 503
                client.leave()
            assert CUT_HANDSHAKE in caplog.text


async def test_it_is_asked_how_it_is_with_the_same_trust(folder: Path, port: int) -> None:
    trusted, stranger = (
        Upstream(UpstreamConfig(url=f"https://localhost:{port}", models=("far",), ca_file=ca_file), ProxyConfig())
        for ca_file in (str(folder / "cert.pem"), None)
    )

    async with UpstreamClient(trusted, 5) as client:
        status = await client.status("/health")
    async with UpstreamClient(stranger, 5) as client:
        with pytest.raises(UpstreamError, match="self-signed certificate"):
            await client.status("/health")

    assert status == 404


@pytest.mark.parametrize("text", [None, "no certificate"], ids=["absent", "no certificate"])
def test_an_authority_that_cannot_be_read_is_an_error_of_the_config(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "ca.pem").write_text(text)
    upstream = UpstreamConfig(url="https://localhost", models=("far",), ca_file=str(tmp_path / "ca.pem"))

    with pytest.raises(ConfigError, match=r"ca_file .*ca\.pem: "):
        Forwarder(Config(model=(), upstream=(upstream,)))


@pytest.mark.parametrize(
    ("authority", "said", "num_read"), [("cert.pem", "answered", 1), (os.devnull, "not trusted", 0)]
)
async def test_clients_of_aiohttp_read_the_systems_certificates_when_they_first_connect(
    folder: Path, port: int, authority: str, said: str, num_read: int
) -> None:
    environment = {**os.environ, "SSL_CERT_FILE": str(folder / authority), "SSL_CERT_DIR": str(folder / "absent")}
    command = [sys.executable, "-c", AIOHTTP_IMPORTED_BY_A_SERVER, f"https://localhost:{port}/"]

    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=subprocess.PIPE)
    output, _ = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)

    assert process.returncode == 0
    assert output.decode().splitlines() == ["2 0 0", said, said, str(num_read)]
