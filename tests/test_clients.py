"""The clients of docs/clients.md: each line of its first table is a program in `clients/`, run here against the toy."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from brlite.app import create_app
from brlite.config.options import Config, EngineConfig, ModelSpec
from brlite.http.listen import HttpServer
from brlite.llm import AsyncEngine
from tests.clients.__main__ import CLIENTS, QUIET
from tests.limits import PATIENCE_SECONDS

SCRIPTS = Path(__file__).parent / "clients"
PAGE = (Path(__file__).parent.parent / "docs" / "clients.md").read_text(encoding="utf-8")
INSTALL = ("install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", "--loglevel=error")
# Python programs, and the packages that they import.
PYTHON = {
    "openai_python.py": ("openai",),
    "anthropic_python.py": ("anthropic",),
    "litellm_sdk.py": ("litellm",),
    "pydantic_ai_agent.py": ("pydantic_ai",),
    "instructor_client.py": ("instructor",),
}
NODE = ("anthropic_node.js", "ai_sdk.js")


@pytest.fixture
async def url() -> AsyncIterator[str]:
    """The address of a server of the toy."""
    config = Config(model=(ModelSpec(name="toy", path=None, build_seq=4096),), engine=EngineConfig(name="toy"))
    async with (
        AsyncEngine.from_config(config) as engine,
        HttpServer(create_app(engine, config), "127.0.0.1", 0, config.limits, grace_seconds=0.2) as server,
    ):
        yield server.url


@pytest.fixture(scope="module")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages that the programs for Node import: 55 MB."""
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed: apt-get install nodejs npm")
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", *NODE):
        shutil.copy(SCRIPTS / name, folder)
    if subprocess.run([npm, *INSTALL], cwd=folder, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("npm cannot install the clients for Node here")
    return folder


async def run(*command: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, env={**os.environ, **QUIET}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    printed, _ = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)
    assert process.returncode == 0, printed.decode()


@pytest.mark.parametrize("script", PYTHON)
async def test_a_python_client_works(url: str, script: str) -> None:
    for package in PYTHON[script]:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed: the extra brlite[clients] has it")

    await run(sys.executable, str(SCRIPTS / script), url, "toy")


@pytest.mark.parametrize("script", NODE)
async def test_a_client_for_node_works(url: str, script: str, node_folder: Path) -> None:
    await run("node", str(node_folder / script), url, "toy")


def test_the_page_lists_the_programs_that_run() -> None:
    listed = re.findall(r"\]\(\.\./tests/clients/(\S+?)\)", PAGE)
    programs = {path.name for path in SCRIPTS.iterdir() if path.suffix in (".py", ".js")} - {"__main__.py"}

    assert sorted(listed) == sorted([*PYTHON, *NODE, *(client.script for client in CLIENTS.values())])
    assert sorted(programs) == sorted(listed)


@pytest.mark.parametrize("name", CLIENTS)
def test_the_page_gives_the_versions_of_clients_that_are_run_by_hand(name: str) -> None:
    package, version = re.fullmatch(r"(@?[^@=\[]+)(?:\[.*\])?(?:==|@)(\S+)", CLIENTS[name].packages[0]).groups()
    (line,) = [line for line in PAGE.splitlines() if f"/{CLIENTS[name].script})" in line]

    assert f"`{package}`" in line
    assert f"| {version} |" in line
    assert f"| `{name}` |" in line
