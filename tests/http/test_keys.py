"""Who may ask: every path but the open ones needs a key, however it is spelt."""

from __future__ import annotations

import ast
import hmac
import json
from pathlib import Path

import pytest

import brlite
from brlite.config.options import Config, KeyConfig, KeysConfig
from brlite.errors import ConfigError, RateLimited, Unauthorized
from brlite.http.api_key import ApiKey
from brlite.http.keys import ApiKeys, shown_key

ODD_PATHS = [
    "/v1/models",
    "//v1/models",
    "/v1//models",
    "/v1/models/",
    "/v1/models//",
    "/v1/./models",
    "/v1/x/../models",
    "/v1/%6dodels",
    "/%761/models",
    "/v1/models?x=1",
    "/v1/models#x",
    "/v1/models;x",
    "/v1/models%00",
    "/v1/models%20",
    "/v1%2fmodels",
    "/V1/MODELS",
    "/health/../v1/models",
    "/health/..%2fv1/models",
    "/health%2f..%2fv1/models",
    "/health/",
    "//health",
    "/health;/v1/models",
    "/health%00",
    "/HEALTH",
    "/%68ealth",
    "/health#/v1/models",
    "/",
    "/unknown",
    "http://127.0.0.1/v1/models",
    "http://127.0.0.1/v1/models",
    "http://x@y/health?/v1/models",
    "/\xff/v1/models",
]
SECRET = "sk-secret-1"


@pytest.mark.parametrize("path", ODD_PATHS)
async def test_no_spelling_of_a_path_gets_round_the_key(path, http_server, connect, hello) -> None:
    server = await http_server({"GET /v1/models": hello, "GET /health": hello}, keys=(SECRET,))
    client = await connect(server)

    client.send(f"GET {path} HTTP/1.1\r\nHost: /health\r\nConnection: close\r\n\r\n".encode("latin-1"))
    answer = await client.rest()

    assert answer[8:13] in (b" 401 ", b" 400 ")
    assert b"hello" not in answer


@pytest.mark.parametrize("path", [f"/llm{path}" for path in ODD_PATHS if path.startswith("/")])
async def test_no_spelling_gets_round_the_key_where_the_application_is_mounted(
    path, http_server, connect, hello
) -> None:
    server = await http_server({"GET /v1/models": hello, "GET /health": hello}, keys=(SECRET,), prefix="/llm")
    client = await connect(server)

    client.send(f"GET {path} HTTP/1.1\r\nHost: /llm/health\r\nConnection: close\r\n\r\n".encode("latin-1"))

    assert b"hello" not in await client.rest()


@pytest.mark.parametrize("method", ["POST", "PUT", "HEAD", "OPTIONS", "TRACE", "PATCH", "DELETE"])
async def test_no_method_gets_round_the_key(method, http_server, connect, hello) -> None:
    server = await http_server({"GET /v1/models": hello}, keys=(SECRET,))
    client = await connect(server)

    client.send(f"{method} /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    answer = await client.rest()

    assert answer.startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (f"Authorization: Bearer {SECRET}", 200),
        (f"authorization: bEARER {SECRET}", 200),
        (f"X-Api-Key: {SECRET}", 200),
        (f"Authorization: Basic abc\r\nX-Api-Key: {SECRET}", 200),
        ("Authorization: Bearer sk-secret-2", 200),
        ("X-Unrelated: 1", 401),
        ("Authorization:", 401),
        ("Authorization: Bearer", 401),
        ("Authorization: Bearer ", 401),
        (f"Authorization: {SECRET}", 401),
        (f"Authorization: Bearer {SECRET}x", 401),
        (f"Authorization: Bearer {SECRET[:-1]}", 401),
        (f"Authorization: Bearer {SECRET.upper()}", 401),
        ("Authorization: Bearer \xff\xfe", 401),
        (f"Authorization: Basic {SECRET}", 401),
        (f"Cookie: Authorization=Bearer {SECRET}", 401),
        ("X-Api-Key: wrong", 401),
    ],
)
async def test_a_key_is_taken_from_the_two_headers_only(headers, status, http_server, connect, hello) -> None:
    server = await http_server({"GET /v1/models": hello}, keys=(SECRET, "sk-secret-2"))
    client = await connect(server)

    client.send(f"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n\r\n".encode("latin-1"))
    answer = await client.rest()

    assert answer.startswith(f"HTTP/1.1 {status} ".encode())


async def test_a_refusal_tells_how_to_send_a_key_and_does_not_repeat_the_wrong_one(http_server, connect, hello, caplog):
    caplog.set_level("DEBUG")
    server = await http_server({"GET /v1/models": hello}, keys=(SECRET,))
    client = await connect(server)

    client.send(b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Api-Key: nearly-secret\r\nConnection: close\r\n\r\n")
    head, _, body = (await client.rest()).partition(b"\r\n\r\n")

    assert b"WWW-Authenticate: Bearer" in head
    assert json.loads(body)["error"]["code"] == "invalid_api_key"
    assert "nearly-secret" not in body.decode() + caplog.text


@pytest.mark.parametrize("prefix", ["", "/llm"])
async def test_the_open_path_needs_no_key_even_with_a_query(prefix, http_server, connect, hello) -> None:
    server = await http_server({"GET /health": hello}, keys=(SECRET,), prefix=prefix)
    client = await connect(server)

    client.send(f"GET {prefix}/health?x=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())

    assert (await client.rest()).endswith(b"hello")


def test_keys_come_from_config_file_and_environment_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# staff\nfrom-file\n\n")
    monkeypatch.setenv("SOME_KEY", "from-env")

    keys = ApiKeys.from_config(Config(keys=KeysConfig(keys=("from-config",), file=str(file), env="SOME_KEY")))

    assert all(keys.find(key) for key in ("from-config", "from-file", "from-env"))
    assert keys.find("# staff") is None
    assert repr(keys) == "ApiKeys(3 keys)"


def test_without_keys_everybody_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BRLITE_API_KEY", raising=False)

    assert ApiKeys.from_config(Config()).is_open


@pytest.mark.parametrize("content", [None, b"", b"# nothing\n", b"\xff\xfe"])
def test_a_key_file_that_gives_no_key_stops_the_server(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(ConfigError, match=r"keys\.file: .*keys"):
        ApiKeys.from_config(Config(keys=KeysConfig(file=str(file))))


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="must not be empty"):
        ApiKeys(("good", " "))
    with pytest.raises(ConfigError, match="must not be empty"):
        ApiKeys(named=[("", ApiKey(KeyConfig(name="team-a")))])


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "shown"),
    [
        (None, None, None),
        ("Bearer one", None, "one"),
        ("bEARER  one ", "two", "one"),
        ("Basic one", "two", "two"),
        ("Basic one", None, None),
        ("Bearer", "two", ""),
        (None, "two", "two"),
    ],
)
def test_the_bearer_token_goes_before_the_other_header(authorization, x_api_key, shown) -> None:
    assert shown_key(authorization, x_api_key) == shown


def test_each_key_is_found_with_its_own_rules() -> None:
    team_a, team_b = ApiKey(KeyConfig(name="team-a")), ApiKey(KeyConfig(name="team-b"))
    keys = ApiKeys(["plain-1", "plain-2"], [("sk-a", team_a), ("sk-b", team_b)])

    found = [keys.find(secret) for secret in ("sk-a", "sk-b", "sk-c", "", None)]

    assert found == [team_a, team_b, None, None, None]
    plain = [keys.find("plain-1"), keys.find("plain-2")]
    assert [key is not None and (key.name, key.has_limits) for key in plain] == [("", False)] * 2
    named = ApiKeys.from_config(Config(key=(KeyConfig(name="a", key="x"),)))
    tenants = {key.tenant for key in (*plain, *named) if key is not None}
    assert len(tenants) == 3  # each shares turns and caches with itself only
    assert list(keys) == [team_a, team_b]
    assert repr(keys) == "ApiKeys(4 keys)"


def test_a_key_with_rules_alone_closes_the_server() -> None:
    keys = ApiKeys(named=[("sk-a", ApiKey(KeyConfig(name="team-a")))])

    assert not keys.is_open
    with pytest.raises(Unauthorized, match="didn't provide"):
        keys.require(None)
    with pytest.raises(Unauthorized, match="Incorrect"):
        keys.require("sk-b")


def test_on_an_open_server_every_key_is_as_good_as_none() -> None:
    keys = ApiKeys()

    assert keys.require(None) is keys.require("any")
    assert not keys.require(None).has_limits


def test_the_secret_of_a_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAM_A_KEY", " sk-a\n")

    keys = ApiKeys.from_config(Config(key=(KeyConfig(name="team-a", env="TEAM_A_KEY"),)))

    found = keys.find("sk-a")
    assert found is not None
    assert found.name == "team-a"


@pytest.mark.parametrize("content", [None, "", "  "])
def test_a_variable_that_holds_no_key_is_named(content: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEAM_A_KEY", raising=False)
    if content is not None:
        monkeypatch.setenv("TEAM_A_KEY", content)

    with pytest.raises(ConfigError, match=r"key\[1\]\.env: .* TEAM_A_KEY is not set, or empty"):
        ApiKeys.from_config(Config(key=(KeyConfig(name="b", key="b"), KeyConfig(name="a", env="TEAM_A_KEY"))))


@pytest.mark.parametrize(
    ("plain", "message"),
    [((), "key two: its secret is also that of the key one"), ((SECRET,), "key one: its secret is also that in")],
)
def test_a_secret_belongs_to_one_key_only_and_is_not_shown(plain: tuple[str, ...], message: str) -> None:
    config = Config(
        keys=KeysConfig(keys=plain), key=(KeyConfig(name="one", key=SECRET), KeyConfig(name="two", key=SECRET))
    )

    with pytest.raises(ConfigError, match=message) as caught:
        ApiKeys.from_config(config)

    assert SECRET not in str(caught.value)


def test_replaced_keys_are_those_of_the_others_and_what_a_name_has_used_stays_used() -> None:
    keys = ApiKeys(
        ["plain-1"],
        [("sk-a", ApiKey(KeyConfig(name="team-a", requests_per_minute=1))), ("sk-b", ApiKey(KeyConfig(name="team-b")))],
    )
    key = keys.require("sk-a")
    key.begin(0.0, "m")

    is_changed = keys.replace(
        ApiKeys(["plain-2"], [("sk-new", ApiKey(KeyConfig(name="team-a", requests_per_minute=1)))])
    )

    assert is_changed
    assert [keys.find(secret) for secret in ("plain-1", "sk-a", "sk-b")] == [None, None, None]
    assert keys.find("plain-2") is not None
    assert keys.find("sk-new") is key
    assert list(keys) == [key]
    assert key.num_running == 1
    with pytest.raises(RateLimited):
        key.begin(1.0, "m")


def test_a_key_whose_limit_changes_begins_a_new_minute_and_keeps_its_count() -> None:
    key = ApiKey(KeyConfig(name="team-a", requests_per_minute=1))
    key.begin(0.0, "m")

    key.take_rules(ApiKey(KeyConfig(name="team-a", requests_per_minute=2, models=("m",))))

    key.begin(1.0, "m")
    assert key.usage.num_admitted == 2
    assert not key.may_use("other")


def test_keys_that_stay_the_same_are_no_change() -> None:
    keys = ApiKeys(["plain"], [("sk-a", ApiKey(KeyConfig(name="team-a")))])

    is_changed = keys.replace(ApiKeys(["plain"], [("sk-a", ApiKey(KeyConfig(name="team-a", requests_per_minute=5)))]))

    assert not is_changed
    assert keys.require("sk-a").has_limits


def test_a_shown_key_is_compared_with_all_keys_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ApiKeys(("sk-1", "sk-2"), [(f"sk-{name}", ApiKey(KeyConfig(name=name))) for name in "ab"])
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return left == right

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for shown in ("sk-1", "sk-b", "sk-wrong", ""):
        compared.clear()
        assert (keys.find(shown) is not None) == (shown in ("sk-1", "sk-b"))
        assert len(compared) == 4
        assert {len(side) for pair in compared for side in pair} == {32}


SECRETS = {"secret", "digest", "known", "shown", "shown_key", "claimed", "proof", "_digest", "_known", "api_key"}


def named(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def test_no_key_and_no_proof_is_compared_by_an_operator() -> None:
    """An operator ends at the first byte that differs, so its time shows how many were right."""
    package = Path(brlite.__file__).parent
    found = []
    for file in ("http/keys.py", "http/api_key.py", "proxy/fast_path.py", "backends/distributed/secret.py"):
        for node in ast.walk(ast.parse((package / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare) and not all(isinstance(each, ast.Is | ast.IsNot) for each in node.ops):
                found += [f"{file}:{node.lineno}" for side in (node.left, *node.comparators) if named(side) in SECRETS]

    assert found == []
