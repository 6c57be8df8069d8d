"""A server goes on whatever becomes of its output, and counts what is lost. Real processes, pipes and disks."""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from brlite.process.output import MAX_LINES, QueuedStream, num_dropped_lines, queued_output
from tests.limits import PATIENCE_SECONDS
from tests.process.servers import BRLITE, TOY, free_port, get, running, wait_until_it_answers


def dropped(port: int) -> float:
    found = re.search(r"^brlite:log_lines_dropped_total (\S+)$", get(port, "/metrics")[1], re.MULTILINE)
    assert found is not None
    return float(found[1])


def commands(port: int) -> dict[str, list[str]]:
    return {
        "serve": [BRLITE, "serve", *TOY, "--engine-option", "start_seconds=0.5", "--port", str(port)],
        "proxy": [BRLITE, "proxy", "--upstream", "toy=http://127.0.0.1:9", "--port", str(port)],
    }


@pytest.mark.parametrize("command", ["serve", "proxy"])
def test_a_reader_that_reads_nothing_does_not_hold_the_server(command: str) -> None:
    port = free_port()
    with running(commands(port)[command], stderr=subprocess.PIPE) as process:
        wait_until_it_answers(port, "/health")

        # A line each, of 430 letters: more than the pipe, a full queue and one that the thread has taken hold (1.1 MB).
        ask_for_nothing(port, num_times=2800)
        lost = dropped(port)
        process.terminate()

        assert process.wait(PATIENCE_SECONDS) == 0
    assert lost > 0


def ask_for_nothing(port: int, num_times: int) -> None:
    """Requests on one connection, each of which leaves a line in the log."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_SECONDS) as client:
        request = b"GET /%b HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Request-Id: %b\r\n\r\n" % (b"x" * 200, b"y" * 128)
        sender = threading.Thread(target=client.sendall, args=(request * num_times,))
        sender.start()
        text, num_answers = b"", 0
        while num_answers < num_times:
            text = text[-20:] + client.recv(65536)
            num_answers += len(re.findall(rb"HTTP/1.1 404", text))
            text = text[text.rfind(b"404") + 3 :]
        sender.join()


@pytest.mark.parametrize(("stream", "num_lines"), [("stdout", 0), ("stderr", 0), ("stderr", 1)])
def test_a_reader_that_leaves_while_the_model_loads_ends_nothing(stream: str, num_lines: int) -> None:
    port = free_port()
    outputs = {"stderr": subprocess.DEVNULL, stream: subprocess.PIPE}
    with running(commands(port)["serve"], **outputs) as process:
        pipe: IO[bytes] = getattr(process, stream)
        for _ in range(num_lines):
            pipe.readline()
        pipe.close()

        wait_until_it_answers(port)
        lost = dropped(port)
        process.terminate()

        assert process.wait(PATIENCE_SECONDS) == 0
    assert (lost > 0) == (stream == "stderr")


def test_a_full_disk_ends_nothing() -> None:
    port = free_port()
    with open("/dev/full", "wb") as full, running(commands(port)["serve"], stdout=full, stderr=full) as process:
        wait_until_it_answers(port)

        assert dropped(port) > 0
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0


def test_without_standard_streams_nothing_is_printed_into_a_connection() -> None:
    port = free_port()
    script = f"exec {' '.join(commands(port)['serve'])} <&- >&- 2>&-"
    with running(["bash", "-c", script]) as process:
        wait_until_it_answers(port)

        names = [os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)]
        assert names == ["/dev/null"] * 3
        process.terminate()
        assert process.wait(PATIENCE_SECONDS) == 0


def test_what_ends_a_server_is_told_where_somebody_reads(tmp_path: Path) -> None:
    command = [BRLITE, "serve", "--port", "70000"]

    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    assert result.returncode == 2
    assert result.stderr.startswith("brlite: error: command line: server.port = 70000")
    assert result.stderr.count("\n") == 1


@pytest.fixture
def pipe() -> Iterator[tuple[int, io.TextIOWrapper]]:
    """A pipe's end to read, and its other end as a text stream."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w", encoding="ascii", errors="backslashreplace") as stream:
        yield reader, stream
    os.close(reader)


def test_lines_come_in_order_and_as_the_stream_would_have_encoded_them(pipe) -> None:
    reader, stream = pipe
    queued = QueuedStream(stream)

    print("one", "你", file=queued)
    queued.write("half ")
    queued.write("a line\n")
    queued.write("no newline")
    queued.finish(PATIENCE_SECONDS)

    stream.close()
    assert read_to_end(reader) == b"one \\u4f60\nhalf a line\nno newline"
    assert queued.num_dropped == 0


def test_what_does_not_fit_is_dropped_counted_and_said(pipe) -> None:
    reader, stream = pipe
    queued = QueuedStream(stream)
    for number in range(4 * MAX_LINES):  # more than the pipe and the queue hold
        queued.write(f"{number:0300}\n")
    received: list[bytes] = []
    thread = threading.Thread(target=lambda: received.append(read_to_end(reader)))
    thread.start()
    queued.finish(PATIENCE_SECONDS)
    stream.close()
    thread.join()

    lines = received[0].decode().splitlines()
    told = [int(line.split()[0]) for line in lines if "lines are missing here" in line]
    assert queued.num_dropped > 0
    assert sum(told) == queued.num_dropped
    assert len(lines) - len(told) + queued.num_dropped == 4 * MAX_LINES


def read_to_end(reader: int) -> bytes:
    parts = []
    while part := os.read(reader, 65536):
        parts.append(part)
    return b"".join(parts)


def read_to(reader: int, mark: bytes) -> bytes:
    text = b""
    while mark not in text:
        text += os.read(reader, 65536)
    return text


def test_a_pipe_that_another_process_has_made_non_blocking_is_waited_for(pipe) -> None:
    reader, stream = pipe
    os.set_blocking(stream.fileno(), False)
    queued = QueuedStream(stream)
    text = "x" * 100_000 + "\n"  # more than a pipe holds

    queued.write(text)
    received = read_to(reader, b"\n")
    queued.finish(PATIENCE_SECONDS)

    assert received.decode() == text
    assert queued.num_dropped == 0


def test_streams_are_given_back_at_the_end(capfd) -> None:
    before = sys.stdout, sys.stderr

    with queued_output():
        print("to be read", file=sys.stderr)
        assert num_dropped_lines() == 0
        assert isinstance(sys.stderr, QueuedStream)

    assert (sys.stdout, sys.stderr) == before
    assert capfd.readouterr().err == "to be read\n"


def test_a_reader_of_a_commands_work_that_leaves_is_no_error(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("[limits]\nmax_n = 2\n")
    with running([BRLITE, "check", str(config)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        errors = process.stderr.read()

        assert (process.wait(PATIENCE_SECONDS), errors) == (0, b"")
