"""`brlite run NAME`: serve a model and chat with it, in one word. The server ends with the chat."""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory

from brlite.errors import ConfigError, ModelError
from brlite.files.quoting import shown

HOST = "127.0.0.1"
POLL_SECONDS = 0.1
STOP_SECONDS = 30.0
SERVER_ERROR = "brlite: error: "


def add_run(parser: argparse.ArgumentParser) -> None:
    name = "a model: organisation/model[:QUANT][@revision], a folder or a .gguf file (default: a small English model)"
    parser.add_argument("name", nargs="?", metavar="NAME", help=name)
    port = "port of the server on this machine (default 8000 if it is free, else any)"
    parser.add_argument("--port", type=int, metavar="N", help=port)
    parser.add_argument("--context", type=int, metavar="N", help="maximum context in tokens, prompt plus answer")
    parser.add_argument("--device", help="device that computes: auto, cpu or another torch device")
    parser.add_argument("--threads", type=int, metavar="N", help="number of threads (0: one per physical core)")
    parser.add_argument("--engine", metavar="NAME", help="engine: auto, native, torch, or toy")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="maximum length of an answer in tokens")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="sampling temperature; 0 always takes the most probable token"
    )
    parser.set_defaults(logs_from="warning")


def run(args: argparse.Namespace) -> int:
    """Fetch the model if need be, start `brlite serve`, and chat until the end of input. Returns the exit status."""
    from brlite.commands import chat
    from brlite.process.children import ChildGroup, child_environment, python_module
    from brlite.sampling_params import SamplingParams

    set_ones = {name: getattr(args, name) for name in ("max_tokens", "temperature")}
    given = {"max_tokens": None} | {name: value for name, value in set_ones.items() if value is not None}
    SamplingParams(**given)  # raises for what is out of range, before a model is loaded
    _fetch(args.name, args.engine)
    port = args.port or _free_port()
    options = {"--model": args.name} | {
        f"--{name}": getattr(args, name) for name in ("context", "device", "threads", "engine")
    }
    flags = [word for flag, value in options.items() if value is not None for word in (flag, str(value))]
    with TemporaryDirectory(prefix="brlite-run-") as folder, ChildGroup() as group:
        log = Path(folder) / "log"
        # In an empty folder: a config of this one would change what is served. So paths are made absolute.
        flags = [
            str(Path(word).absolute()) if Path(word).exists() and not word.startswith("-") else word for word in flags
        ]
        command = [*python_module("brlite"), "serve", *flags, "--host", HOST, "--port", str(port)]
        with log.open("wb") as stderr:
            server = group.start(command, env=child_environment(), stdout=subprocess.DEVNULL, stderr=stderr, cwd=folder)
        try:
            _wait_until_ready(server, port, log)
            print(f"serving at http://{HOST}:{port} until this chat ends", file=sys.stderr)
            return chat.run(f"http://{HOST}:{port}", model=None, api_key=None, system=args.system, given=given)
        finally:
            server.terminate()
            try:
                server.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()


def _fetch(name: str | None, engine: str | None) -> None:
    """Download here, where a terminal shows the bar, and where the token of the environment is."""
    from brlite.checkpoint.fetch import locate_model, progress_bar
    from brlite.config.options import DEFAULT_MODEL

    if engine not in (None, "auto", "native", "torch") or (name is not None and Path(name).exists()):
        return
    with progress_bar() as show:
        locate_model(name or DEFAULT_MODEL, None, show)


def _free_port() -> int:
    """The usual port, else one that the system gives; it stays free as long as no other program takes it."""
    from brlite.config.options import ServerConfig

    for port in (ServerConfig().port, 0):
        try:
            with socket.create_server((HOST, port)) as listener:
                return int(listener.getsockname()[1])
        except OSError:
            continue
    raise ConfigError("no port could be opened on 127.0.0.1; --port chooses another one")


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Show how far the loading is. Raises `ModelError` with what the server said where it ends."""
    from brlite.checkpoint.fetch import progress_bar

    with progress_bar() as show:
        while server.poll() is None:
            try:
                with urllib.request.urlopen(f"http://{HOST}:{port}/ready", timeout=5):
                    return
            except urllib.error.HTTPError as error:
                for model in _models_of(error.read()):
                    show(str(model.get("stage", "")), float(str(model.get("progress", 0))))
            except OSError:
                show("starting the server", 0.0)
            time.sleep(POLL_SECONDS)
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = next(
        (line.removeprefix(SERVER_ERROR) for line in lines if line.startswith(SERVER_ERROR)), (lines or ["no word"])[-1]
    )
    raise ModelError(f"the server ended with status {server.returncode}: {shown(said)}")


def _models_of(body: bytes) -> list[dict[str, object]]:
    try:
        return list(json.loads(body).get("models", []))
    except (ValueError, AttributeError, TypeError):
        return []
