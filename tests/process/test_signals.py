"""A command as process 1, in a process namespace of its own, where this machine allows one."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from tests.limits import PATIENCE_SECONDS
from tests.process.servers import BRLITE, TOY, free_port, running, wait_until_it_answers
from tests.processes import children

UNSHARE = ["unshare", "--fork", "--pid", "--mount-proc", "--kill-child"]
MAY_UNSHARE = subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0

pytestmark = pytest.mark.skipif(not MAY_UNSHARE, reason="this machine gives no process namespace")


def start(port: int) -> list[str]:
    return [*UNSHARE, BRLITE, "serve", *TOY, "--port", str(port), "--log-level", "error"]


def test_orphans_are_reaped() -> None:
    port = free_port()
    with running(start(port), stderr=subprocess.DEVNULL) as process:
        wait_until_it_answers(port)
        (init,) = children(process.pid)
        enter = ["nsenter", "-t", str(init), "-p", "-m"]

        for _ in range(5):  # the shell ends first, so what it has started is process 1's
            subprocess.run([*enter, "sh", "-c", "sleep 0.1 & exit 0"], check=True)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len([*children(init)]) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)

        assert len([*children(init)]) == 1  # the command itself


def test_process_1_has_the_commands_status() -> None:
    result = subprocess.run(
        [*UNSHARE, BRLITE, "serve", "--port", "70000"], capture_output=True, timeout=PATIENCE_SECONDS
    )

    assert result.returncode == 2


def test_process_1_ends_with_the_command_though_it_inherited_an_ignored_sigchld() -> None:
    script = f"trap '' CHLD; exec {BRLITE} serve --port 70000"

    result = subprocess.run([*UNSHARE, "bash", "-c", script], capture_output=True, timeout=PATIENCE_SECONDS)

    assert result.returncode == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_process_1_ends_the_server_in_good_order(number: signal.Signals) -> None:
    port = free_port()
    with running(start(port), stderr=subprocess.DEVNULL) as process:
        wait_until_it_answers(port)

        os.kill(next(children(process.pid)), number)

        assert process.wait(PATIENCE_SECONDS) == 0
