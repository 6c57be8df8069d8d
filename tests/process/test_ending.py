"""How the process of a command ends while threads run. Each test has a process of its own."""

from __future__ import annotations

import subprocess
import sys

from tests.limits import PATIENCE_SECONDS

# `Freed` prints a line when Python frees what modules hold, which a thread that still runs may use.
COMMAND = """
import atexit, os, threading
from concurrent.futures import ThreadPoolExecutor
from brlite import __main__ as entry
from brlite.commands import cli
from brlite.process.waiting import start_daemon

class Freed:
    def __del__(self, write=os.write):
        write(1, b"freed\\n")

held = Freed()
atexit.register(os.write, 1, b"atexit\\n")
never, runs = threading.Event(), threading.Event()

def work():
    runs.set()
    never.wait()

def command():
    START
    runs.wait()
    print("the last line", flush=True)
    return 3

cli.main = command
entry.main()
"""


def test_nothing_is_freed_under_a_daemon_thread_that_still_runs() -> None:
    result = run_command("start_daemon(work, 'load')")

    assert (result.returncode, result.stdout, result.stderr) == (3, "the last line\natexit\n", "")


def test_a_process_ends_without_waiting_for_the_thread_of_a_pool() -> None:
    result = run_command("ThreadPoolExecutor(1).submit(work)")

    assert (result.returncode, result.stdout, result.stderr) == (3, "the last line\natexit\n", "")


def run_command(start: str) -> subprocess.CompletedProcess[str]:
    code = COMMAND.replace("START", start)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_SECONDS)
