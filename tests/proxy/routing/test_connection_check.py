"""Dialling upstreams: what is said about servers that are well, sick, silent, strangers or not there."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from brlite.commands.check import check
from brlite.config.options import Config, ProxyConfig, UpstreamConfig
from brlite.errors import ConfigError
from brlite.proxy.routing.connection_check import Dialled, Finding, dial_all
from brlite.proxy.routing.route_table import RouteTable
from tests.limits import PATIENCE_SECONDS
from tests.proxy.get_server import NEVER, Answer, GetServer, model_list

LISTS_A = {"/v1/models": model_list({"id": "a"})}
SHORT_SECONDS = 0.1  # of an answer that does not come


async def dial(url: str, models: tuple[str, ...] = ("a",), seconds: float = PATIENCE_SECONDS, **fields: Any) -> Dialled:
    """What is found out about one upstream named `gpu`, each of whose answers may take so long."""
    upstream = UpstreamConfig(url=url, models=models, name="gpu", **fields)
    proxy = ProxyConfig(health_timeout_seconds=seconds, connect_seconds=PATIENCE_SECONDS)
    table = RouteTable(Config(model=(), upstream=(upstream,), proxy=proxy))
    (result,) = await dial_all(table.upstreams, proxy)
    return result


def without_time(line: str) -> str:
    """The line, with 0 for the milliseconds that connecting took."""
    before, connected, after = line.partition("connected in ")
    return before + connected + ("0" + after[after.index(" ms") :] if connected else "")


async def test_a_server_that_is_well_and_has_the_model_is_ok() -> None:
    async with GetServer(LISTS_A) as server:
        result = await dial(server.url, api_key="sk-secret")

    assert without_time(result.line) == "ok      gpu: connected in 0 ms; /health answers 200; lists a"
    assert result.is_good
    assert {request.headers["Authorization"] for request in server.asked} == {"Bearer sk-secret"}
    assert "sk-secret" not in result.line


async def test_a_unix_socket_is_dialled_too(tmp_path: Path) -> None:
    async with GetServer(LISTS_A, str(tmp_path / "model.sock")) as server:
        assert (await dial(server.url)).is_good


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"/health": Answer(503)}, "/health answers 503"),
        ({"/health": NEVER}, "did not answer GET /health within 0.1 s"),
        ({"/health": Answer(302, headers={"Location": "/elsewhere"})}, "/health answers 302"),
        ({"/v1/models": NEVER}, "did not answer GET /v1/models within 0.1 s"),
        ({"/v1/models": Answer(401)}, "/v1/models answers 401, it wants another key"),
        ({"/v1/models": Answer(body=b"<html>")}, "its list of models cannot be read: DecodeError"),
        ({"/v1/models": Answer(body=b" " * 2**21)}, "answered more than 1048576 bytes to GET /v1/models"),
        ({"/v1/models": model_list({"id": "b"})}, "does not list a"),
    ],
)
async def test_what_would_fail_requests_is_a_failure(answers: dict[str, Answer], said: str) -> None:
    async with GetServer({**LISTS_A, **answers}) as server:
        result = await dial(server.url, seconds=SHORT_SECONDS if NEVER in answers.values() else PATIENCE_SECONDS)

    assert result.line.startswith("failed  gpu: connected in ")
    assert Finding(False, said) in result.findings


async def test_a_server_that_lists_no_models_is_ok() -> None:
    async with GetServer() as server:
        result = await dial(server.url)

    assert result.is_good
    assert result.line.endswith("; /v1/models answers 404, so its models are not known")


async def test_models_go_by_the_upstreams_names_for_them() -> None:
    async with GetServer(LISTS_A) as server:
        result = await dial(server.url, ("mine", "b"), rename={"mine": "a"})

    assert result.line.endswith("; lists a; does not list b")


async def test_health_that_is_never_asked_for_is_not_asked_for_here() -> None:
    async with GetServer(LISTS_A) as server:
        result = await dial(server.url, health_path="")

    assert "health" not in result.line
    assert "/health" not in server.paths


async def test_a_place_where_nobody_listens_is_a_failure() -> None:
    async with GetServer() as server:
        url = server.url

    assert (await dial(url)).line == "failed  gpu: cannot connect: Connection refused"


async def test_a_server_without_tls_is_no_https_upstream() -> None:
    async with GetServer() as server:
        result = await dial(server.url.replace("http:", "https:"))

    assert result.line.startswith("failed  gpu: cannot connect: [SSL")


async def test_check_dials_when_it_is_told_to_and_says_so_by_its_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "proxy.toml"
    async with GetServer(LISTS_A) as server, GetServer() as other:
        tables = f'[[upstream]]\nurl = "{server.url}"\nmodels = ["a"]\nname = "one"\napi_key = "sk-secret"\n'
        path.write_text(f'{tables}[[upstream]]\nurl = "{other.url}"\nmodels = ["a"]\nname = "two"\nweight = 2\n')
        well = await asyncio.to_thread(check, path, dial=True)
        other.answers["/health"] = Answer(500)
        sick = await asyncio.to_thread(check, path, dial=True)
        asked = len(server.asked)
        undialled = await asyncio.to_thread(check, path)

    printed = capsys.readouterr().out
    assert (well, sick, undialled) == (0, 1, 0)
    assert len(server.asked) == asked
    assert (
        f"forwarded a\n  to        one at {server.url}, weight 1\n            two at {other.url}, weight 2\n" in printed
    )
    assert "\nfailed  two: connected in " in printed
    assert "sk-secret" not in printed


def test_several_files_are_checked_as_a_proxys(tmp_path: Path) -> None:
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text("")
    second.write_text("")

    with pytest.raises(ConfigError, match=r"only one \.toml is allowed"):
        check(first, second)
