"""`brlite chat` without a model: what the next question is asked with."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
from collections.abc import AsyncGenerator

import pytest

from brlite.commands.chat import Messages, converse, shown
from brlite.errors import EngineError
from tests.limits import PATIENCE_SECONDS
from tests.process.servers import BRLITE, running


async def test_a_question_that_failed_is_not_asked_again_with_the_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    async def ask(messages: Messages) -> AsyncGenerator[str, None]:
        asked.append([message["content"] for message in messages])
        yield "half"
        if messages[-1]["content"] == "second":
            raise EngineError("a step failed")

    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond\nthird\n"))
    await converse(ask, "system")

    assert asked == [["system", "first"], ["system", "first", "half", "second"], ["system", "first", "half", "third"]]
    assert "a step failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("\r\x9b31m\x00\x7f", "\\r\\x9b31m\\x00\\x7f"),
        ("a\u202eb\u2066c\ufeff", "a\\u202eb\\u2066c\\ufeff"),
        ("two\nlines\tand a\u00a0space", "two\nlines\tand a\u00a0space"),
        ("你好 👩\u200d💻 e\u0301", "你好 👩\u200d💻 e\u0301"),
    ],
)
async def test_what_a_model_says_cannot_steer_the_terminal(
    text: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def ask(messages: Messages) -> AsyncGenerator[str, None]:
        yield text

    monkeypatch.setattr("sys.stdin", io.StringIO("first\n"))
    await converse(ask, None)

    assert capsys.readouterr().out == f"{expected}\n"
    assert shown(text) == expected


def test_ctrl_c_at_the_prompt_ends_at_once() -> None:
    ours, theirs = pty.openpty()
    command = [BRLITE, "chat", "--engine", "toy", "--model", "toy"]
    with running(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        seen = b""
        while not seen.endswith(b"> "):
            seen += os.read(ours, 1024)

        process.send_signal(signal.SIGINT)

        assert process.wait(PATIENCE_SECONDS) == 130
    os.close(ours)
    assert b"Traceback" not in seen


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "latin-1"])
def test_what_the_terminal_cannot_show_is_shown_as_an_escape(encoding: str) -> None:
    result = subprocess.run(
        [BRLITE, "chat", "--engine", "toy", "--model", "toy"],
        input="\ufeff你好 😀\nagain\n".encode(),
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=PATIENCE_SECONDS,
    )

    assert result.returncode == 0
    assert b"Traceback" not in result.stderr
    assert b"\\U0001f600" in result.stdout
    assert result.stdout.rstrip().endswith(b"again")
