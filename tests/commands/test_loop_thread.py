"""Nothing on the loop's thread of `brlite serve` waits for a disk or a resolver: audited in the real command."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.limits import PATIENCE_SECONDS
from tests.proxy.test_tls import MAKE_CERTIFICATE
from tests.tiny_models import write_byte_tokenizer, write_tiny_model

# Writes a line for each file that is opened and each name that is looked up on a thread that runs an event loop.
AUDITED = """
import asyncio, os, sys
EVENTS = ("open", "os.listdir", "os.scandir", "socket.getaddrinfo", "socket.gethostbyname", "subprocess.Popen")
def hook(event, arguments):
    if event not in EVENTS or asyncio._get_running_loop() is None:
        return
    if not str(arguments[0]).startswith(("/proc/", "/sys/")):  # in memory: what /metrics says of the process
        os.write(2, f"ON THE LOOP: {event} {str(arguments[0])[:200]}\\n".encode())
import encodings.idna  # which create_server needs for any host
sys.addaudithook(hook)
from brlite.commands.cli import main
sys.exit(main(sys.argv[1:]))
"""


def upstream(port: int, ca_file: Path) -> str:
    lines = (f'url = "https://localhost:{port}"', f'models = ["m{port}"]', f'ca_file = "{ca_file}"')
    return "\n".join(("[[upstream]]", *lines, "")) + "\n"


def wait_for(pattern: str, log: Path) -> re.Match[str]:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (found := re.search(pattern, log.read_text())) is None:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return found


def test_no_file_is_opened_and_no_name_looked_up_on_the_loop(tmp_path: Path) -> None:
    config, keys, ca_file, model = (tmp_path / name for name in ("brlite.toml", "keys.txt", "cert.pem", "tiny"))
    model.mkdir()
    write_tiny_model(model)
    write_byte_tokenizer(model)
    keys.write_text("sk-1\n")
    subprocess.run(MAKE_CERTIFICATE, cwd=tmp_path, check=True, capture_output=True)
    text = f'[keys]\nfile = "{keys}"\n[[model]]\nname = "tiny"\npath = "{model}"\n'
    config.write_text(text + upstream(1, ca_file))
    log = tmp_path / "log"
    command = [sys.executable, "-c", AUDITED, "serve", str(config), "--port", "0"]

    with log.open("wb") as errors, subprocess.Popen(command, stderr=errors) as process:
        try:
            url = wait_for(r"listening on (\S+);", log)[1]
            wait_for("brlite is ready", log)
            request = urllib.request.Request(f"{url}/metrics?upstream=all", headers={"Authorization": "Bearer sk-1"})
            with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as response:
                assert b"brlite:upstream_scrape_ok" in response.read()
            keys.write_text("sk-2\n")
            config.write_text(text + upstream(1, ca_file) + upstream(2, ca_file))
            process.send_signal(signal.SIGHUP)
            wait_for("config: .*m2", log)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_SECONDS) == 0, log.read_text()
        finally:
            process.kill()

    assert [line for line in log.read_text().splitlines() if line.startswith("ON THE LOOP")] == []


def test_the_error_for_an_unknown_model_reads_no_files(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", AUDITED, "serve", "--engine", "toy", "--model", "toy", "--port", "0"]

    with log.open("wb") as errors, subprocess.Popen(command, stderr=errors, cwd=tmp_path) as process:
        try:
            url = wait_for(r"listening on (\S+);", log)[1]
            with pytest.raises(urllib.error.HTTPError, match="404") as answer:
                urllib.request.urlopen(f"{url}/v1/models/toi", timeout=PATIENCE_SECONDS)
            text = answer.value.read()
        finally:
            process.kill()

    assert b"Did you mean `toy`?" in text
    assert "ON THE LOOP" not in log.read_text()
