"""The Chinese quick start runs as printed: its files are written, its commands executed in their order."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from brlite.files.cache import default_cache

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "zh" / "quickstart.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
SECONDS = 100  # for one command


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Shell:
    """Runs the page's blocks in a folder. Ports are replaced by free ones; servers are ended at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = {port: str(free_port()) for port in sorted(set(re.findall(r"\b80\d\d\b", PAGE)))}
        self.servers: list[subprocess.Popen[bytes]] = []

    def run(self, language: str, block: str) -> str:
        for port, free in self.ports.items():
            block = block.replace(port, free)
        block = block.replace("~/.cache/brlite", str(default_cache()))
        if language == "json":
            (self.folder / "smollm2.json").write_text(block)
            return block
        command = ["bash", "-ec", block] if language == "bash" else [sys.executable, "-c", block]
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        if block.rstrip().endswith("&"):
            self._serve(block.strip().removesuffix("&"), environment)
            return block
        result = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=SECONDS
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    def _serve(self, line: str, environment: dict[str, str]) -> None:
        with (self.folder / f"server-{len(self.servers)}.log").open("wb") as log:
            server = subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=self.folder, env=environment, stderr=log)
        self.servers.append(server)
        url = f"http://127.0.0.1:{line.split('--port')[1].strip()}/ready"
        deadline = time.monotonic() + SECONDS
        while not is_ready(url):
            assert server.poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline, Path(log.name).read_text()
            time.sleep(0.1)


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    yield shell
    for server in shell.servers:
        server.send_signal(signal.SIGTERM)
    for server in shell.servers:
        server.wait(SECONDS)


@pytest.mark.model
@pytest.mark.timeout(600)
def test_the_page_runs_from_top_to_bottom(shell: Shell, smollm2_path: Path) -> None:
    install, *blocks = BLOCKS
    assert install[1].splitlines()[0] in (ROOT / "README.md").read_text(encoding="utf-8")

    outputs = [shell.run("bash", "brlite doctor"), *(shell.run(language, block) for language, block in blocks)]

    assert "instruction set" in outputs[0]
    assert sum("data: [DONE]" in output for output in outputs) == 2
    models = next(json.loads(output) for output in outputs if output.startswith('{"object":"list"'))
    assert [model["id"] for model in models["data"]] == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert "vllm:num_requests_running" in outputs[-1]
