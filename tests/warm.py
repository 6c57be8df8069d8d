"""Processes for tests that need one each: a Python that has made its imports forks once for each of them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.limits import PATIENCE_SECONDS

# A line of its input is [program, arguments, the file of its input, of its output, of its errors]; the answer is a
# status. The forked process runs the program as `python -c` does, to the interpreter's end.
FORKS = """
import gc, json, os, sys
gc.freeze()  # else each child goes over all that was imported, at its end at the latest: a second with torch
while line := sys.stdin.buffer.readline():
    program, arguments, *files = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, file in enumerate(files):
            os.dup2(os.open(file, os.O_WRONLY if number else os.O_RDONLY), number)
        sys.argv[1:] = arguments
        break
    os.write(1, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    os._exit(0)
exec(compile(program, "<test>", "exec"))
"""


class WarmPython:
    """A Python after `imports`. Close it at the end."""

    def __init__(self, imports: str) -> None:
        command = [sys.executable, "-c", f"{imports}\n{FORKS}"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )

    def run(self, program: str, *arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
        """What a fork of it that runs the program prints for such an input, and its status."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("input", "output", "errors")]
            for file in files:
                file.write_text(text if file.name == "input" else "", encoding="utf-8")
            order = json.dumps([program, list(map(str, arguments)), *map(str, files)])
            self._process.stdin.write(order.encode() + b"\n")
            try:
                if not select.select([self._process.stdout], [], [], PATIENCE_SECONDS)[0]:
                    raise TimeoutError(program)
                status = int(self._process.stdout.readline())
            except BaseException:  # it hangs, by this limit or by pytest's
                os.killpg(self._process.pid, signal.SIGKILL)
                raise
            return subprocess.CompletedProcess([], status, *(file.read_bytes().decode() for file in files[1:]))

    def close(self) -> None:
        self._process.communicate(timeout=PATIENCE_SECONDS)
