"""Windows, as far as missing modules and functions tell: every file can be imported, and the proxy forwards."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.limits import PATIENCE_SECONDS

ROOT = Path(__file__).parent.parent.parent
AS_ON_WINDOWS = [sys.executable, str(ROOT / "tests" / "emulated" / "windows.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
ANSWER = b'{"object": "text_completion", "choices": []}'


class Upstream(BaseHTTPRequestHandler):
    """A server that gives one answer."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(ANSWER)))
        self.end_headers()
        self.wfile.write(ANSWER)


@pytest.fixture
def upstream() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Upstream) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


def ask(url: str) -> bytes:
    """The answer of a server that may still be starting."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    request = urllib.request.Request(url, b'{"model": "m", "prompt": "a"}', {"Content-Type": "application/json"})
    while True:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as response:
                return bytes(response.read())
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_every_file_can_be_imported() -> None:
    result = subprocess.run([*AS_ON_WINDOWS, "imports"], env=ENVIRONMENT, capture_output=True, text=True)

    assert (result.stdout, result.returncode) == ("", 0), result.stderr


def test_the_proxy_forwards_and_stops(upstream: str, tmp_path: Path) -> None:
    port = free_port()
    command = [*AS_ON_WINDOWS, "proxy", "--upstream", f"m={upstream}", "--port", str(port)]
    process = subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path, stderr=subprocess.PIPE)
    try:
        answer = ask(f"http://127.0.0.1:{port}/v1/completions")
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE_SECONDS)

    assert answer == ANSWER
    assert (process.returncode, b"Traceback" in said) == (0, False), said
