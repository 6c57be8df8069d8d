"""What `brlite serve` tells a newcomer. The command itself is run by `test_end_to_end.py`."""

from __future__ import annotations

import json
import shlex

import pytest

from brlite.commands.serve import curl_line


@pytest.mark.parametrize("model", ["org/name-1.5", "it's", 'a "quoted" \\name', "夏天"])
def test_the_line_to_paste_survives_the_shell_and_json(model: str) -> None:
    words = shlex.split(curl_line("http://127.0.0.1:8000", model, is_chat=True, needs_key=False).replace("\\\n", ""))

    assert words[:3] == ["curl", "-N", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(words[-1])["model"] == model
    assert "YOUR_KEY" not in "".join(words)


def test_a_model_without_a_template_is_asked_to_complete() -> None:
    words = shlex.split(curl_line("http://h", "m", is_chat=False, needs_key=True).replace("\\\n", ""))

    assert words[2] == "http://h/v1/completions"
    assert "prompt" in json.loads(words[-1])
    assert "Authorization: Bearer YOUR_KEY" in words
