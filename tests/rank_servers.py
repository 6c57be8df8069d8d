"""`brlite` commands whose model several processes compute, on tiny models, and what a test does to those processes."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp

from tests.limits import PATIENCE_SECONDS
from tests.processes import children
from tests.tiny_models import write_byte_tokenizer, write_tiny_model

BRLITE = (sys.executable, "-m", "brlite")
ENVIRONMENT = {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}


class RankServer:
    """A server's process and the ranks that it has started. `lines` are what it says."""

    def __init__(self, *command: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT | environment, start_new_session=True
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self._said: list[str] = []
        self._reading = threading.Thread(target=self._read)
        self._reading.start()
        self.url = ""

    def wait_ready(self) -> None:
        self.url = self.wait_for(r"listening on (http://\S+);")
        self.wait_for(r"(brlite is ready)")

    def wait_for(self, pattern: str) -> str:
        """What it says that matches."""
        while (line := self.lines.get(timeout=PATIENCE_SECONDS)) is not None:
            if match := re.search(pattern, line):
                return match[1]
        raise AssertionError("the server ended:\n" + "".join(self._said))

    def rank_pids(self) -> list[int]:
        return sorted(child for child in children(self.process.pid))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_SECONDS)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reading.join()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr:
            for line in self.process.stderr:
                self._said.append(line)
                self.lines.put(line)
        self.lines.put(None)


@contextmanager
def serving(*command: str, **environment: str) -> Iterator[RankServer]:
    """A server that is ready; killed at the end, if it still runs."""
    server = RankServer(*command, **environment)
    try:
        server.wait_ready()
        yield server
    finally:
        server.close()


def write_model(folder: Path, name: str = "llama") -> Path:
    path = write_tiny_model(folder / name, name)
    write_byte_tokenizer(path)
    return path


def write_manual_config(folder: Path, model: Path, *, ranks: int) -> Path:
    """The manual's 13 fields."""
    path = folder / f"{model.name}-{ranks}.json"
    fields = {
        "model": model.name,
        "cached_dir": str(model),
        "input_name": "input_ids.1",
        "output_name": "9",
        "vocab_size": 300,
        "model_file": "",
        "serialize_file": "",
        "model_precision": "bf16",
        "build_seq": 128,
        "build_batch": 4,
        "distribute_param": [ranks, 1, 1],
        "devices": list(range(ranks)),
        "all_models": {"http://host:port": model.name},
    }
    path.write_text(json.dumps(fields))
    return path


async def wait_status(session: aiohttp.ClientSession, path: str, status: int) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        async with session.get(path) as response:
            if response.status == status:
                return
        assert time.monotonic() < deadline, f"{path} never had status {status}"
