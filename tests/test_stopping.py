"""How a server leaves: the grace time of its requests, and the signals that shorten it. The command with the toy."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.limits import PATIENCE_SECONDS
from tests.process.servers import BRLITE, TOY, free_port, running, wait_until_it_answers


def test_a_second_signal_ends_streams_at_once_with_their_event(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    command = [BRLITE, "serve", *TOY, "--engine-option", "tokens_per_second=1", "--port", str(port)]
    body = {"model": "toy", "prompt": "x" * 200, "max_tokens": 200, "stream": True}
    with log.open("wb") as file, running(command, stderr=file) as process:
        wait_until_it_answers(port)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        stream = connection.getresponse()
        stream.readline()

        process.terminate()
        wait_for(log, "stopping: running requests have 30 seconds to finish")
        while "are ended now" not in log.read_text():  # a signal within a second of another is the same one
            os.kill(process.pid, signal.SIGTERM)
            time.sleep(1.1)
        rest = stream.read().decode()
        connection.close()
        stream.close()

        assert process.wait(PATIENCE_SECONDS) == 0
    assert "the server is stopping" in rest
    assert "docker kills after 10 unless told otherwise (--stop-timeout 45, stop_grace_period: 45s)" in log.read_text()


# Each signal comes twice, as from a wrapper that signals its child and the child's group. Until REPEATED_SIGNAL_SECONDS
# have passed, which they have by no clock here, it is the same one.
SIGNALS = """
import asyncio, signal
from brlite.commands import serve

async def main():
    second = asyncio.Event()

    def send(is_new):
        serve.REPEATED_SIGNAL_SECONDS = 0 if is_new else 3600
        signal.raise_signal(NUMBER)

    async with serve._stop_signal(second.set) as stop:
        send(True)
        await stop
        send(False)
        if COUNT > 1:
            send(True)
            await second.wait()
            send(False)
    send(False)
    assert second.is_set() == (COUNT > 1)

asyncio.run(main())
serve.REPEATED_SIGNAL_SECONDS = 3600
signal.raise_signal(NUMBER)
print("closed", flush=True)
serve.REPEATED_SIGNAL_SECONDS = 0
signal.raise_signal(NUMBER)
print("after the end")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("count", [1, 2])
def test_a_signal_that_comes_twice_counts_once_until_the_process_has_ended(number: signal.Signals, count: int) -> None:
    code = SIGNALS.replace("NUMBER", str(int(number))).replace("COUNT", str(count))

    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
    )

    assert (ended.returncode, ended.stdout, ended.stderr) == (-number, "closed\n", "")


def wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
