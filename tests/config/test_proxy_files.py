"""A proxy's config: a TOML, the manual's JSON files and the command line, put together or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from brlite.config.options import UpstreamConfig
from brlite.config.proxy_files import load_proxy_config
from brlite.config.warnings import config_warnings
from brlite.errors import ConfigError
from tests.config.test_manual_json import FIXTURES

QWEN, LLAMA = "Qwen/Qwen1.5-14B-Chat", "codellama/CodeLlama-34b-hf"
TABLE = {"http://10.0.0.1:8000": QWEN, "http://10.0.0.2:8000": LLAMA}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files go by their bare names."""
    monkeypatch.chdir(tmp_path)


def seed(name: str, fixture: str, all_models: dict[str, str]) -> Path:
    """A file of the manual's multi-service pair, with another table."""
    fields = json.loads((FIXTURES / f"{fixture}.json").read_text())
    path = Path(name)
    path.write_text(json.dumps({**fields, "all_models": all_models}))
    return path


def toml(text: str, name: str = "proxy.toml") -> Path:
    path = Path(name)
    path.write_text(text)
    return path


def refusal(*files: Path, named_urls: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_proxy_config(files, named_urls)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_manuals_pair_becomes_one_proxy() -> None:
    pair = [seed("a.json", "manual_qwen1.5_14b", TABLE), seed("b.json", "manual_codellama_34b", TABLE)]

    config = load_proxy_config(pair)

    assert config.model == ()
    assert config.upstream == tuple(UpstreamConfig(url=url, models=(model,)) for url, model in TABLE.items())
    assert config_warnings(config) == []


def test_two_spellings_of_an_address_are_one_upstream() -> None:
    other = {"http://10.0.0.1:8000/": QWEN, "http://10.0.0.2:8000/v1": LLAMA, "http://10.0.0.3:8000": LLAMA}
    pair = [seed("a.json", "manual_qwen1.5_14b", TABLE), seed("b.json", "manual_codellama_34b", other)]

    config = load_proxy_config(pair)

    assert [upstream.url for upstream in config.upstream] == [*TABLE, "http://10.0.0.3:8000"]


def test_files_that_contradict_each_other_are_named() -> None:
    pair = [
        seed("a.json", "manual_qwen1.5_14b", TABLE),
        seed("b.json", "manual_codellama_34b", {"http://10.0.0.1:8000": LLAMA}),
    ]

    line = refusal(*pair)

    assert line.startswith(
        f'a.json and b.json: all_models: http://10.0.0.1:8000 has two models, "{QWEN}" and "{LLAMA}"'
    )


def test_placeholders_are_left_out_and_warned_about() -> None:
    table = {"http://10.0.0.1:8000": QWEN, "http://host_ip2:port2": LLAMA}

    config = load_proxy_config([seed("a.json", "manual_qwen1.5_14b", table)])

    assert [upstream.url for upstream in config.upstream] == ["http://10.0.0.1:8000"]
    (warning,) = config_warnings(config)
    assert warning.startswith(f"all_models: http://host_ip2:port2 is not an address, so {LLAMA}")


def test_a_table_of_placeholders_alone_is_refused() -> None:
    assert refusal(FIXTURES / "manual_qwen1.5_14b.json").endswith(
        "all_models: http://host_ip1:port1, http://host_ip2:port2: none is an address; allowed is http://HOST[:PORT]"
    )


def test_a_file_whose_own_model_is_nowhere_is_refused() -> None:
    path = seed("a.json", "manual_qwen1.5_14b", {"http://10.0.0.2:8000": LLAMA})

    line = refusal(path)

    assert line == f'a.json: all_models: "{QWEN}", the model of this file, has no URL'
    assert load_proxy_config([path], [f"{QWEN}=http://10.0.0.1"]).upstream[1].models == (QWEN,)


def test_the_command_line_alone_is_enough() -> None:
    named_urls = ["org/a=http://h:1", "org/a=http://h:2/v1", "b=https://h", "b=x=unix:/run/b.sock", "c=http://h:1"]

    config = load_proxy_config([], named_urls)

    assert [(upstream.url, upstream.models) for upstream in config.upstream] == [
        ("http://h:1", ("org/a", "c")),
        ("http://h:2/v1", ("org/a",)),
        ("https://h", ("b",)),
        ("unix:/run/b.sock", ("b=x",)),
    ]


def test_the_command_line_adds_to_the_files() -> None:
    text = '[server]\nport = 9\n[[upstream]]\nurl = "http://h:1"\nmodels = ["a"]\nweight = 2\n'
    files = [toml(text), seed("a.json", "manual_qwen1.5_14b", TABLE)]

    config = load_proxy_config(files, ["b=http://h:1", "c=http://h:2"])

    assert config.server.port == 9
    assert [(upstream.models, upstream.weight) for upstream in config.upstream] == [
        (("a", "b"), 2),
        ((QWEN,), 1),
        ((LLAMA,), 1),
        (("c",), 1),
    ]


def test_a_toml_may_hold_the_manuals_table() -> None:
    config = load_proxy_config([toml('[proxy.all_models]\n"http://h:1" = "a"\n"http://ip:port" = "b"\n')])

    assert [upstream.models for upstream in config.upstream] == [("a",)]
    assert config.proxy.all_models == {"http://ip:port": "b"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[model]]\nname = "a"', "proxy.toml: [[model]]: `brlite proxy` serves no model of its own; `brlite serve`"),
        ("[server]\nport = 9", "proxy.toml: no [[upstream]] and no all_models: no server to forward to"),
        ('[[upstream]]\nurl = "h"\nmodels = ["a"]', 'proxy.toml: upstream[0].url = "h": allowed is http://HOST[:PORT]'),
        ('[[upstream]]\nurl = "http://h"\nmodels = []', "proxy.toml: upstream[0].models = []: allowed is "),
        ("upstream = 3", "proxy.toml: upstream = 3: allowed is "),
        ('[proxy]\nchoice = "random"', 'proxy.toml: proxy.choice = "random": allowed are '),
    ],
)
def test_a_toml_that_is_no_proxys_is_refused(text: str, message: str) -> None:
    assert refusal(toml(text)).startswith(message)


@pytest.mark.parametrize("url", ["https://me:hunter2@h", "me:hunter2@h", "https://me:hunter/2@h/x"])
def test_a_password_in_an_url_is_not_shown(url: str) -> None:
    text = f'[[upstream]]\nurl = "{url}"\nmodels = ["a"]\n'

    shown = refusal(toml(text * 2))

    assert shown.startswith(
        "proxy.toml: upstream[0].url: allowed is one without user and password; upstream[0].api_key "
    )
    assert "hunter" not in shown


@pytest.mark.parametrize(
    "text", ["a", "a=", "=http://h", "a=h:1", "a=ftp://h", "a=http://h:0", "http://h:1", "a=http://"]
)
def test_an_upstream_that_is_no_name_and_url_is_refused(text: str) -> None:
    assert refusal(named_urls=(text,)).startswith(f'command line: --upstream "{text}": allowed is NAME=URL, ')


def test_nothing_to_forward_to_is_an_error_that_says_what_helps() -> None:
    assert refusal() == (
        "proxy: no upstream; give a config (a .toml, or br-vllm-serving's .json files) or --upstream NAME=URL"
    )


def test_one_toml_is_enough() -> None:
    files = [toml("", "a.toml"), toml("", "b.toml")]

    assert refusal(*files).startswith("b.toml: only one .toml is allowed, and a.toml is one")


def test_other_files_are_refused() -> None:
    assert refusal(Path("a.yaml")) == "a.yaml: a config file ends in .toml or .json"
