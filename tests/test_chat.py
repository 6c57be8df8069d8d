"""`brlite chat` without a model: what the next question is asked with."""

from __future__ import annotations

import io
from collections.abc import AsyncGenerator

import pytest

from brlite.chat import Messages, converse
from brlite.errors import EngineError


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
