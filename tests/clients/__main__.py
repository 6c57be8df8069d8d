"""Runs clients that are too large for every test run: `python -m tests.clients [NAME…]`; all without a name.

Each is installed into a folder of its own, in the version given here. Then the server and the client run in a network
namespace that has loopback alone, so that no client can dial out. `--keep DIR` keeps what was installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
PORT = 18000  # nothing else listens in the namespace
START_SECONDS = 300
RUN_SECONDS = 900
INSTALL = ("install", "--no-audit", "--no-fund", "--no-package-lock", "--loglevel=error")
QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "true",
    "AI_SDK_TELEMETRY_DISABLED": "1",
}


class Client(NamedTuple):
    """A program of this folder, what it needs, and whether it needs a model that has learnt something.

    The others are run against the toy engine, which says again what it was told: so a client can be made to call tools.
    """

    script: str
    packages: tuple[str, ...]
    needs_model: bool = False

    @property
    def is_node(self) -> bool:
        return self.script.endswith(".js")


CLIENTS = {
    "langchain-openai": Client(
        "langchain_openai_suite.py", ("langchain-openai==1.7.4", "langchain-tests==1.1.9"), needs_model=True
    ),
    "langchain.js": Client("langchain_js.js", ("@langchain/openai@1.6.0", "@langchain/core@1.4.0", "zod@4.6.7")),
    "opencode": Client("opencode_agent.js", ("opencode-ai@1.18.33",)),
    "llama-index": Client(
        "llama_index_client.py",
        ("llama-index-llms-openai-like==0.8.1", "llama-index-embeddings-openai-like==0.4.0"),
    ),
    "llm": Client("llm_cli.py", ("llm==0.36",)),
    "smolagents": Client("smolagents_client.py", ("smolagents[openai]==1.26.0",), needs_model=True),
    "dspy": Client("dspy_client.py", ("dspy[numpy]==3.4.1", "litellm==1.110.2"), needs_model=True),
    "litellm-proxy": Client("litellm_proxy.py", ("litellm[proxy]==1.108.7",)),
    "aider": Client("aider_agent.py", ("aider-chat==0.86.2",)),
    "aiperf": Client("aiperf_load.py", ("aiperf==0.13.0",)),
    "lm-eval": Client("lm_eval_harness.py", ("lm-eval[api]==0.4.13",), needs_model=True),
}


def install(client: Client, folder: Path) -> list[str]:
    """Install what a client needs, unless all of it is there. Returns the command that runs its program."""
    wanted, installed = "\n".join(client.packages), folder / "installed"  # written when everything is
    if not (installed.exists() and installed.read_text() == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if client.is_node:
            (folder / "package.json").write_text('{"private": true, "type": "module"}')
            subprocess.run(["npm", *INSTALL, *client.packages], cwd=folder, check=True)
        else:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *client.packages], check=True)
        installed.write_text(wanted)
    if client.is_node:
        shutil.copy(FOLDER / client.script, folder)
        return ["node", str(folder / client.script)]
    return [str(folder / "bin" / "python"), str(FOLDER / client.script)]


def run_isolated(client: Client, command: list[str]) -> int:
    """Run a client beside a server, with loopback alone. Returns its exit status."""
    again = [sys.executable, "-m", "tests.clients", "--beside", "model" if client.needs_model else "toy", *command]
    loopback = [sys.executable, str(ROOT / "tests" / "loopback_only.py")]
    isolated = ["unshare", "--map-root-user", "--net", *loopback, *again]
    return subprocess.run(isolated, cwd=ROOT, env={**os.environ, **QUIET}).returncode


def run_beside_server(kind: str, command: list[str]) -> int:
    """Start a server, run the command with its address and its model's name, and end the server."""
    url = f"http://127.0.0.1:{PORT}"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "brlite.toml"
        toy = '[engine]\nname = "toy"\n[[model]]\nname = "toy"\nbuild_seq = 65536\n'
        config.write_text(f"[server]\nport = {PORT}\n{toy if kind == 'toy' else ''}")
        brlite = Path(sys.executable).with_name("brlite")
        with (
            (Path(folder) / "log").open("w+") as log,
            subprocess.Popen([brlite, "serve", config], stderr=log) as server,
        ):
            try:
                name = wait_ready(url, server)
                return subprocess.run([*command, url, name], cwd=folder, timeout=RUN_SECONDS).returncode
            finally:
                server.terminate()


def wait_ready(url: str, server: subprocess.Popen[bytes]) -> str:
    """Wait until the server takes requests: it lists its model before it has loaded it. Returns the model's name."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/ready"), urllib.request.urlopen(f"{url}/v1/models") as answer:
                return str(json.load(answer)["data"][0]["id"])
        except OSError:  # it does not listen yet, or answers 503
            time.sleep(0.2)
    raise RuntimeError("the server did not start")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CLIENTS))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="install here, and keep it")
    options = parser.parse_args()
    if unknown := set(options.names) - set(CLIENTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(CLIENTS)}")
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.names or CLIENTS:
            command = install(CLIENTS[name], (options.keep or Path(temporary)).resolve() / name)
            status = run_isolated(CLIENTS[name], command)
            print(f"{name}: {'works' if status == 0 else 'fails'} ({', '.join(CLIENTS[name].packages)})", flush=True)
            failed += [name] if status else []
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--beside"]:
        sys.exit(run_beside_server(sys.argv[2], sys.argv[3:]))
    sys.exit(main())
