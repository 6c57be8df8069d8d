"""What a first user waits for: megabytes fetched, CPU seconds to the first answer, a warm start, idle memory.

    python bench/install.py                  # builds a wheel of this tree, and installs it in a fresh venv
    python bench/install.py --wheel FILE     # the same with a wheel that is there
    python bench/install.py --short          # no install: this Python's brlite, with the toy

Packages come from the registry that pip is configured for, and nothing is taken from pip's cache. CPU seconds are those
of all processes that take part. Compiling the wheel is counted by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from measuring.memory import tree_memory

ROOT = Path(__file__).parent.parent
MB = 1e6
READY_SECONDS = 900.0
SETTLE_SECONDS = 2.0
TOY = ("--engine", "toy", "--model", "toy")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="a wheel of brlite (default: built from this tree)")
    parser.add_argument("--short", action="store_true", help="no install: this Python's brlite, with the toy")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="brlite-install-") as name:
        folder = Path(name)
        figures = short(folder) if args.short else whole(folder, args.wheel)
    print(json.dumps(figures, indent=1))


def short(folder: Path) -> dict[str, float]:
    """The warm start and the idle memory of this Python's brlite."""
    return {"warm first token s": first_answer(sys.executable, folder, *TOY), **idle_memory(sys.executable, folder)}


def whole(folder: Path, wheel: Path | None) -> dict[str, float]:
    figures = {}
    if wheel is None:
        before = cpu_seconds()
        run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder / "built", ROOT])
        (wheel,) = (folder / "built").glob("brlite-*.whl")
        figures["CPU s to compile the wheel"] = cpu_seconds() - before
    before = cpu_seconds()
    run([sys.executable, "-m", "venv", folder / "venv"])
    python = str(folder / "venv" / "bin" / "python")
    packages = folder / "packages"
    run([python, "-m", "pip", "download", "--quiet", "--no-cache-dir", "--dest", packages, wheel])
    run([python, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", packages, wheel])
    fetched = sum(file.stat().st_size for file in packages.iterdir()) - wheel.stat().st_size
    first = first_answer(python, folder)
    figures["CPU s from the wheel to the first answer"] = cpu_seconds() - before
    model = sum(file.stat().st_size for file in (folder / "cache").rglob("*.gguf"))
    model += sum(file.stat().st_size for file in (folder / "hf").rglob("blobs/*") if not file.is_symlink())
    installed = sum(file.lstat().st_size for file in (folder / "venv").rglob("*") if file.is_file())
    return {
        **figures,
        "MB of packages fetched": fetched / MB,
        "MB of the model fetched": model / MB,
        "MB fetched in all": (fetched + model) / MB,
        "MB of the venv": installed / MB,
        "first answer s, with the download": first,
        "warm first token s": min(first_answer(python, folder) for _ in range(3)),
        **idle_memory(python, folder),
    }


def first_answer(python: str, folder: Path, *options: str) -> float:
    """Seconds from the start of `brlite serve` to the first text of an answer."""
    began = time.monotonic()
    with serving(python, folder, options) as (_, port):
        body = {"prompt": "The sea is", "max_tokens": 8, "temperature": 0, "stream": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=READY_SECONDS) as response:
            assert b'"text"' in response.readline()
            return time.monotonic() - began


def idle_memory(python: str, folder: Path) -> dict[str, float]:
    with serving(python, folder, TOY) as (server, _):
        time.sleep(SETTLE_SECONDS)
        memory = tree_memory(server.pid)
    return {} if memory is None else {"idle MiB of serve with the toy": memory.resident / 2**20}


@contextmanager
def serving(python: str, folder: Path, options: Sequence[str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server whose caches are in `folder`, and its port, once it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    environment = {**os.environ, "BRLITE_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf")}
    command = [python, "-m", "brlite", "serve", *options, "--port", str(port), "--log-level", "warning"]
    with subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.DEVNULL) as server:
        try:
            wait_until_ready(server, port)
            yield server, port
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).close()
            return
        except OSError:
            time.sleep(0.01)
    sys.exit("the server did not become ready")


def run(command: Sequence[object]) -> None:
    subprocess.run([str(word) for word in command], check=True)


def cpu_seconds() -> float:
    """Of the processes that were started here and have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
