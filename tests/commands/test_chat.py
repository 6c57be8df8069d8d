"""`brlite chat` without a model: what the next question is asked with."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import subprocess
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from brlite.commands.chat import Piece, converse
from brlite.commands.conversation import Conversation, Message
from brlite.errors import BrliteError, ConfigError, EngineError
from brlite.files.quoting import shown
from brlite.sampling_params import SamplingParams
from tests.limits import PATIENCE_SECONDS
from tests.process.servers import BRLITE
from tests.warm import WarmPython


async def test_a_question_that_failed_is_not_asked_again_with_the_next(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    async def ask(messages: list[Message], params: SamplingParams) -> AsyncGenerator[Piece, None]:
        asked.append([message.content for message in messages])
        yield Piece("half", 1)
        if messages[-1].content == "second":
            raise EngineError("a step failed")

    monkeypatch.setattr("sys.stdin", io.StringIO("first\n\nsecond\n \nthird\n"))
    await converse(ask, Conversation("system", SamplingParams()))

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
    async def ask(messages: list[Message], params: SamplingParams) -> AsyncGenerator[Piece, None]:
        yield Piece(text, 1)

    monkeypatch.setattr("sys.stdin", io.StringIO("first\n"))
    await converse(ask, Conversation(None, SamplingParams()))

    assert capsys.readouterr().out == f"{expected}\n"
    assert shown(text) == expected


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("/set seed " + "9" * 5000, "seed must be"),
        ("/set temperature " + "[" * 100_000, "temperature must be"),
        ("/save ~no-such-user/x", "~no-such-user/x: cannot be written"),
        ("/load ~no-such-user/x", "~no-such-user/x: cannot be read"),
        ("/save a\0b", "cannot be written: embedded null byte"),
        ("/load a\0b", "cannot be read: embedded null byte"),
        ("/load /dev/zero", "cannot be read: it is larger than"),
        ("/load deep", "deep holds no conversation"),
    ],
    ids=lambda value: value[:20],
)
def test_a_command_that_cannot_be_obeyed_is_one_line(
    command: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("deep").write_text('{"messages":[],"x":' + "[" * 100_000)

    with pytest.raises(BrliteError, match=re.escape(said)):
        Conversation("system", SamplingParams()).obey(command)


def test_half_of_a_character_cannot_be_saved(tmp_path: Path) -> None:
    conversation = Conversation("\udcff", SamplingParams())  # a byte of the terminal that is no UTF-8

    with pytest.raises(ConfigError, match="cannot be written: 'utf-8' codec can't encode"):
        conversation.obey(f"/save {tmp_path / 'saved.json'}")


ESCAPES = "\x1b]0;owned\x07\x9b2J\u202e"
ERROR = json.dumps({"error": {"message": f"no{ESCAPES}\r\nbrlite: all is well"}})
# What a server answers to `/v1/models`, and to a question: a status and a body each.
HOSTILE_SERVERS = {
    "models": ((401, ERROR), (200, "")),
    "models, no JSON": ((200, "{" + ESCAPES), (200, "")),
    "models, a list": ((200, "[1]"), (200, "")),
    "models, none": ((200, '{"data": []}'), (200, "")),
    "a refusal": ((200, '{"data": [{"id": "m"}]}'), (429, ERROR)),
    "a refusal without words": ((200, '{"data": [{"id": "m"}]}'), (500, ESCAPES)),
    "a stream's error": ((200, '{"data": [{"id": "m"}]}'), (200, f"data: {ERROR}\n\n")),
    "a stream of no chunks": ((200, '{"data": [{"id": "m"}]}'), (200, 'data: {"x": 1}\n\n')),
    "a stream of no JSON": ((200, '{"data": [{"id": "m"}]}'), (200, f"data: {{{ESCAPES}\n\n")),
    "choices that are numbers": ((200, '{"data": [{"id": "m"}]}'), (200, 'data: {"choices": [5]}\n\n')),
    "choices that are a number": ((200, '{"data": [{"id": "m"}]}'), (200, 'data: {"choices": 5}\n\n')),
    "a delta of null": ((200, '{"data": [{"id": "m"}]}'), (200, 'data: {"choices": [{"delta": null}]}\n\n')),
    "a text that is a number": (
        (200, '{"data": [{"id": "m"}]}'),
        (200, 'data: {"choices": [{"delta": {"content": 5}}]}\n\n'),
    ),
    "a line without an end": ((200, '{"data": [{"id": "m"}]}'), (200, "x" * 2**20)),
    "a chunk without an end": ((200, '{"data": [{"id": "m"}]}'), (200, "data: {" + "x" * 2**22)),
    "models, nested": ((200, "[" * 100_000), (200, "")),
    "models without an end": ((200, "[" * 2**26), (200, "")),
    "a chunk, nested": ((200, '{"data": [{"id": "m"}]}'), (200, 'data: {"x":' + "[" * 100_000 + "\n\n")),
    "a refusal, nested": ((200, '{"data": [{"id": "m"}]}'), (400, '{"error":' + "[" * 100_000)),
}


@pytest.fixture(scope="module")
def python() -> Iterator[WarmPython]:
    python = WarmPython("from brlite.commands.cli import main; import brlite.commands.chat, aiohttp")
    yield python
    python.close()


@pytest.mark.parametrize("case", HOSTILE_SERVERS)
async def test_what_a_server_says_cannot_steer_the_terminal(case: str, python: WarmPython) -> None:
    (status, models), (answer_status, answer) = HOSTILE_SERVERS[case]

    async def list_models(request: web.Request) -> web.Response:
        return web.Response(status=status, text=models, content_type="application/json")

    async def complete(request: web.Request) -> web.Response:
        return web.Response(status=answer_status, text=answer, content_type="text/event-stream")

    app = web.Application()
    app.add_routes([web.get("/v1/models", list_models), web.post("/v1/chat/completions", complete)])
    async with TestServer(app, host="127.0.0.1") as server:
        chat = "import sys; sys.exit(main(sys.argv[1:]))"
        ended = await asyncio.to_thread(python.run, chat, "chat", "--url", server.make_url("/"), text="hello\n")

    text = ended.stdout + ended.stderr
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert "Traceback" not in text
    assert len([line for line in ended.stderr.splitlines() if line.startswith("brlite: error: ")]) == 1


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
