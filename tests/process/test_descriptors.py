"""The limit of open files: raised where it can be, and where it does not suffice, said before it is felt."""

from __future__ import annotations

import resource
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.limits import PATIENCE_SECONDS
from tests.process.servers import BRLITE, TOY, free_port, running, wait_until_it_answers

WARNING = "limits.max_connections = 2048: this needs up to"


def limited(soft: int, hard: int, *command: str) -> list[str]:
    return ["bash", "-c", f"ulimit -Sn {soft} && ulimit -Hn {hard} && exec {' '.join(command)}"]


def test_the_soft_limit_is_raised_to_the_hard_one() -> None:
    port = free_port()
    with running(limited(96, 4096, BRLITE, "serve", *TOY, "--port", str(port)), stderr=subprocess.DEVNULL) as process:
        wait_until_it_answers(port)

        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (4096, 4096)


@pytest.mark.parametrize("command", ["serve", "proxy", "check"])
def test_a_hard_limit_that_does_not_suffice_is_said_in_one_line(command: str, tmp_path: Path) -> None:
    log, config, port = tmp_path / "log", tmp_path / "c.toml", free_port()
    config.write_text('[engine]\nname = "toy"\n')
    arguments = {
        "serve": ["serve", str(config), "--port", str(port)],
        "proxy": ["proxy", "--upstream", "a=http://127.0.0.1:9", "--port", str(port)],
        "check": ["check", str(config)],
    }[command]
    with log.open("wb") as file, running(limited(200, 200, BRLITE, *arguments), stdout=file, stderr=file) as process:
        if command == "check":
            assert process.wait(PATIENCE_SECONDS) == 0
        else:
            wait_until_it_answers(port, "/health")

    lines = [line for line in log.read_text().splitlines() if WARNING in line]
    assert len(lines) == 1
    assert "this process may open 200" in lines[0]


def test_no_connection_is_reset_where_the_descriptors_do_not_suffice() -> None:
    port = free_port()
    command = limited(200, 200, BRLITE, "serve", *TOY, "--port", str(port))
    with running(command, stderr=subprocess.DEVNULL), ExitStack() as stack:
        wait_until_it_answers(port)

        for _ in range(300):
            client = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS)
            stack.callback(client.close)
            client.sendall(b"GET /version HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200")
