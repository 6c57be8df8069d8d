"""`brlite run NAME`: serves a model and chats with it. The server ends with the chat."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from tempfile import gettempdir

from brlite.checkpoint.fetch import locate_model
from brlite.checkpoint.progress import progress_bar
from brlite.commands.chat import chat_with_server
from brlite.commands.given_config import given_sampling
from brlite.config.options import DEFAULT_MODEL, ServerConfig
from brlite.config.validation import engine_override
from brlite.errors import CannotListen, ModelError
from brlite.files.quoting import shown
from brlite.files.temporary import temporary_folder
from brlite.process.children import ChildGroup, child_environment, python_module

HOST = "127.0.0.1"
POLL_SECONDS = 0.1
STOP_SECONDS = 30.0
SERVER_ERROR = "brlite: error: "
CACHE_VARIABLES = ("BRLITE_CACHE", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")


def run(args: argparse.Namespace) -> int:
    """Download the model if necessary, start `brlite serve`, and chat until the end of input."""
    given = given_sampling(args)
    is_path = args.name is not None and Path(args.name).exists()
    if not is_path and engine_override(args.engine).get("engine.name") is None:
        # Not in the server: this process has a terminal for the progress, and the hub's token in its environment.
        with progress_bar() as show:
            locate_model(args.name or DEFAULT_MODEL, None, show)
    port = _free_port(args.port)
    # The server starts in an empty folder, since a config in this one would change what it serves.
    options = {"--model": Path(args.name).absolute() if is_path else args.name} | {
        f"--{name}": getattr(args, name) for name in ("context", "device", "threads", "engine")
    }
    flags = [word for flag, value in options.items() if value is not None for word in (flag, str(value))]
    folders = {name: os.environ.get(name, "") for name in CACHE_VARIABLES}
    absolute = {name: os.path.abspath(folder) for name, folder in folders.items() if folder[:1] not in ("", "~", "$")}
    with temporary_folder(Path(gettempdir()), "brlite-run") as folder, ChildGroup() as group:
        log = folder / "log"
        command = [*python_module("brlite"), "serve", *flags, "--host", HOST, "--port", str(port)]
        with log.open("wb") as stderr:
            server = group.start(
                command, env=child_environment(**absolute), stdout=subprocess.DEVNULL, stderr=stderr, cwd=folder
            )
        try:
            _wait_until_ready(server, port, log)
            print(f"serving at http://{HOST}:{port} until this chat ends", file=sys.stderr)
            asyncio.run(chat_with_server(f"http://{HOST}:{port}", None, None, args.system, given))
            return 0
        finally:
            server.terminate()
            try:
                server.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()


def _free_port(given: int | None) -> int:
    """The given port. Without one the default port if it is free, else one that the system chooses.

    Raises `CannotListen` where another program has it: the chat would be with that one. It may still take it later.
    """
    reason = None
    for port in (given,) if given else (ServerConfig().port, 0):
        try:
            with socket.create_server((HOST, port)) as listener:
                return int(listener.getsockname()[1])
        except OverflowError:
            return port  # the server names the range
        except OSError as error:
            reason = os.strerror(error.errno or 0)
    raise CannotListen(f"cannot listen on {HOST}:{port}: {reason}; --port takes another one")


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Show the progress of loading. Raises `ModelError` with the server's error if the server ends."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # http_proxy is not for loopback
    with progress_bar() as show:
        while server.poll() is None:
            try:
                with direct.open(f"http://{HOST}:{port}/ready", timeout=5):
                    return
            except urllib.error.HTTPError as error:
                with suppress(ValueError, AttributeError, TypeError):  # another program answers
                    for model in json.loads(error.read()).get("models", []):
                        show(str(model.get("stage", "")), float(str(model.get("progress", 0))))
            except (OSError, HTTPException):  # the second where another program answers
                show("starting the server", 0.0)
            time.sleep(POLL_SECONDS)
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = next(
        (line.removeprefix(SERVER_ERROR) for line in lines if line.startswith(SERVER_ERROR)),
        (lines or ["it printed nothing"])[-1],
    )
    raise ModelError(f"the server ended with status {server.returncode}: {shown(said)}")
