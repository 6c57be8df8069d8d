"""OpenAI's own client for JavaScript, asking for a local model and for a forwarded one. It cannot tell them apart."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.proxy.services import CONTEXT, Service, served, write_model

SCRIPTS = Path(__file__).parent.parent / "node"
INSTALL = ("install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", "--loglevel=error")
MODELS = ("local", "far")
FAR = """
[server]
port = {port}
[[model]]
name = "far"
path = "{path}"
build_seq = {context}
"""
NEAR = """
[server]
port = {port}
[[model]]
name = "local"
path = "{path}"
build_seq = {context}
[[upstream]]
url = "{far}"
models = ["far"]
[[key]]
name = "free"
key = "free"
[[key]]
name = "once-local"
key = "once-local"
requests_per_minute = 1
[[key]]
name = "once-far"
key = "once-far"
requests_per_minute = 1
"""


class Pair(NamedTuple):
    """The server that is asked, which has the model `local`, and the one behind it, which has `far`."""

    near: Service
    far: Service


class Node:
    """The client, installed in a folder."""

    def __init__(self, folder: Path) -> None:
        node, npm = shutil.which("node"), shutil.which("npm")
        if node is None or npm is None:
            pytest.skip("node and npm are not installed: apt-get install nodejs npm")
        for path in SCRIPTS.iterdir():
            shutil.copy(path, folder)
        subprocess.run([npm, *INSTALL], cwd=folder, check=True)
        self.command = [node, str(folder / "ask.js")]

    def ask(self, url: str, model: str, key: str = "free") -> dict[str, Any]:
        """What the client made of the answers to all that `ask.js` asks."""
        result = subprocess.run([*self.command, url, key, model], stdout=subprocess.PIPE, check=True)
        answers: dict[str, Any] = json.loads(result.stdout)
        return answers


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    return Node(tmp_path_factory.mktemp("node"))


@pytest.fixture(scope="module")
def pair(node: Node, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    paths = {name: write_model(folder / name, seed) for seed, name in enumerate(MODELS)}
    with (
        served(folder, "far", FAR, path=paths["far"], context=CONTEXT) as far,
        served(folder, "near", NEAR, path=paths["local"], context=CONTEXT, far=far.url) as near,
    ):
        yield Pair(near, far)


@pytest.fixture(scope="module")
def answers(node: Node, pair: Pair) -> dict[str, dict[str, Any]]:
    """For each model what the client made of its answers."""
    return {model: node.ask(pair.near.url, model) for model in MODELS}


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_says_what_the_whole_answer_says(answers: dict[str, dict[str, Any]], model: str) -> None:
    found = answers[model]

    assert found["chat"] == found["chatStream"]
    assert found["completion"] == found["completionStream"]
    assert len(found["completion"]) > 4
    assert answers["local"]["completion"] != answers["far"]["completion"]


def test_a_forwarded_answer_is_the_other_servers_own(
    node: Node, pair: Pair, answers: dict[str, dict[str, Any]]
) -> None:
    own = node.ask(pair.far.url, "far")

    assert all(answers["far"][name] == own[name] for name in ("chat", "chatStream", "completion", "completionStream"))


@pytest.mark.parametrize("model", MODELS)
def test_errors_have_the_clients_classes(answers: dict[str, dict[str, Any]], model: str) -> None:
    seen = {name: answers[model][name] for name in ("unknownModel", "badField", "wrongKey")}

    assert {name: (error["error"], error["status"], error["code"], error["param"]) for name, error in seen.items()} == {
        "unknownModel": ("NotFoundError", 404, "model_not_found", "model"),
        "badField": ("BadRequestError", 400, "invalid_value", "top_p"),
        "wrongKey": ("AuthenticationError", 401, "invalid_api_key", None),
    }


@pytest.mark.parametrize("model", MODELS)
def test_a_key_that_is_used_up_is_a_rate_limit_error(node: Node, pair: Pair, model: str) -> None:
    found = node.ask(pair.near.url, model, key=f"once-{model}")

    assert isinstance(found["chat"], str)
    refused = [found[name] for name in ("chatStream", "completion", "completionStream")]
    assert {(error["error"], error["code"]) for error in refused} == {("RateLimitError", "rate_limit_exceeded")}


def test_servers_that_are_killed_are_errors_of_the_right_class(node: Node, pair: Pair) -> None:
    """The last test of the file: no other can use the pair after it. One of its own would take 2 s to start."""
    near, far = pair
    arguments = [near.url, "free", "far", str(CONTEXT // 2)]
    with subprocess.Popen([*node.command, *arguments], stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        assert asking.stdout.readline() == "begun\n"
        far.kill()
        broken = json.loads(asking.stdout.read())["longStream"]
    without_far = node.ask(near.url, "far")["chat"]
    local = node.ask(near.url, "local")["chat"]
    near.kill()
    without_near = node.ask(near.url, "local")["chat"]

    assert (broken["error"], broken["code"]) == ("APIError", "upstream_error")
    assert (without_far["error"], without_far["status"]) == ("InternalServerError", 503)
    assert isinstance(local, str)
    assert without_near["error"] == "APIConnectionError"
