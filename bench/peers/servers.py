"""Starts server processes on the loopback interface, waits until they serve, pauses and ends them.

What to start is a `Launch`: brlite's is here, the peers' are in `peers.py`. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from measuring import subject
from measuring.load import Target
from measuring.memory import Memory, tree_memory
from measuring.subject import Tables, variant_tables
from msgspec import Struct

import brlite

HOST = "127.0.0.1"
POLL_SECONDS = 0.2
STOP_SECONDS = 20.0
LOG_TAIL = 25
RUN_BRLITE = "import sys; from brlite.commands.cli import main; sys.exit(main())"
# A server started here asks for no key.
DROPPED_VARIABLES = ("BRLITE_API_KEY",)


class ServerError(Exception):
    """A server could not be prepared or started."""


class Settings(Struct, frozen=True, kw_only=True):
    """What all servers are given alike. `threads = 0` leaves each its own default; `folder` is for their files.

    `tables` are what the command line says to every brlite whose name does not say it.
    """

    model: str
    path: Path
    streams: int
    context: int
    threads: int
    prefix_cache: bool
    folder: Path
    tables: Tables


def read_settings(
    args: argparse.Namespace, stack: ExitStack, *, streams: int, context: int, prefix_cache: bool = False
) -> Settings:
    """The settings of a command line. The folder is removed with `stack`."""
    model = subject.find_model(args.model)
    return Settings(
        model=model.name,
        path=model.path,
        streams=streams,
        context=context,
        threads=args.threads,
        prefix_cache=prefix_cache,
        folder=Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="brlite-bench-"))),
        tables=subject.chosen(args),
    )


class Launch(Struct, frozen=True, kw_only=True):
    """How to start a server on `port`, and how to ask it for completions."""

    name: str
    version: str
    command: Sequence[str]
    port: int
    model: str
    ready_path: str
    fields: Mapping[str, object]
    environment: Mapping[str, str] = {}


class Server(Struct, frozen=True, kw_only=True):
    """A server that can be asked. Without a `pid` its memory is unknown; without a log it was not started here."""

    name: str
    version: str
    target: Target
    pid: int | None = None
    log: Path | None = None

    def memory(self) -> Memory | None:
        return tree_memory(self.pid) if self.pid is not None else None

    def pause(self) -> None:
        """Take the processors from it: an idle server that polls would slow down the one being measured."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def log_tail(self) -> str:
        if self.log is None:
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_TAIL:])

    def _signal(self, number: signal.Signals) -> None:
        if self.pid is not None and self.log is not None:
            _signal_group(self.pid, number)


def launch_brlite(name: str, settings: Settings) -> Launch:
    """brlite of the running Python's environment, with a config of its own: that of the variant `name`."""
    port = free_port()
    config = settings.folder / f"{name}.toml"
    config.write_text(_brlite_toml(variant_tables(name, settings.tables), settings, port))
    return Launch(
        name=name,
        version=brlite.__version__,
        command=[sys.executable, "-c", RUN_BRLITE, "serve", str(config)],
        port=port,
        model=settings.model,
        ready_path="/ready",
        fields={"ignore_eos": True},
    )


def _brlite_toml(variant: Tables, settings: Settings, port: int) -> str:
    # JSON's strings, numbers and truths are TOML's too.
    tables: Tables = {
        "[server]": {"host": HOST, "port": port, "access_log": False, "drain_seconds": 1.0, "log_level": "warning"},
        "[engine]": {"prefix_caching": settings.prefix_cache, **variant["engine"]},
        "[[model]]": {
            "name": settings.model,
            "path": str(settings.path),
            "build_seq": settings.context,
            "build_batch": settings.streams,
            **variant["model"],
        },
    }
    lines = []
    for title, fields in tables.items():
        lines += [title, *(f"{name} = {json.dumps(value)}" for name, value in fields.items()), ""]
    return "\n".join(lines)


@contextmanager
def start(launch: Launch, folder: Path, timeout_seconds: float) -> Iterator[Server]:
    """A running server that says it is ready, in a process group of its own that is ended in any case."""
    log = folder / f"{launch.name}.log"
    environment = {name: value for name, value in os.environ.items() if name not in DROPPED_VARIABLES}
    with log.open("wb") as output:
        process = subprocess.Popen(
            launch.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment, **launch.environment},
            start_new_session=True,
        )
    url = f"http://{HOST}:{launch.port}"
    target = Target(url=url, model=launch.model, fields=launch.fields)
    server = Server(name=launch.name, version=launch.version, target=target, pid=process.pid, log=log)
    try:
        _wait_until_ready(process, server, url + launch.ready_path, timeout_seconds)
        yield server
    finally:
        _end(process)


def start_paused(launches: Sequence[Launch], folder: Path, timeout_seconds: float, stack: ExitStack) -> list[Server]:
    """All of them, each stopped once it is ready, so that none takes time from the one that is measured."""
    started = []
    for launch in launches:
        print(f"starting {launch.name} {launch.version} …", file=sys.stderr)
        started.append(stack.enter_context(start(launch, folder, timeout_seconds)))
        started[-1].pause()
    return started


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(process: subprocess.Popen[bytes], server: Server, url: str, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not _answers(url):
        if process.poll() is not None:
            raise ServerError(f"{server.name} ended with status {process.returncode}:\n{server.log_tail()}")
        if time.monotonic() > deadline:
            raise ServerError(f"{server.name} was not ready after {timeout_seconds:g} s:\n{server.log_tail()}")
        time.sleep(POLL_SECONDS)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):  # not listening yet, or 503 while it loads
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Politely, then by force; a paused process hears nothing before it goes on."""
    for number in (signal.SIGCONT, signal.SIGTERM):
        _signal_group(process.pid, number)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    _signal_group(process.pid, signal.SIGKILL)
    process.wait()


def _signal_group(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # all of it is gone
        os.killpg(pid, number)
