"""Every command prints in any encoding: text for eyes shows something in place of what it cannot, data is UTF-8."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.limits import PATIENCE_SECONDS
from tests.process.servers import BRLITE
from tests.tiny_models import write_byte_tokenizer, write_tiny_model

NAME = "你好 😀"


def run(command: list[str], encoding: str, folder: Path) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    return subprocess.run(
        [BRLITE, *command], cwd=folder, env=environment, capture_output=True, timeout=PATIENCE_SECONDS
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model and a config, both with a name that no narrow encoding has."""
    write_byte_tokenizer(write_tiny_model(tmp_path / NAME))
    text = f'[[model]]\nname = "{NAME}"\npath = "{tmp_path / NAME}"\nbuild_seq = 64\n'
    (tmp_path / f"{NAME}.toml").write_text(text, encoding="utf-8")
    return tmp_path


CHECK = ["check", f"{NAME}.toml"]
OTHERS = [["inspect", NAME], ["serve", "--help"]]  # their streams are set up by the same code


@pytest.mark.parametrize(
    ("command", "encoding"), [(CHECK, "gbk"), *((each, "ascii") for each in [CHECK, *OTHERS])], ids=str
)
def test_text_for_eyes_is_printed_in_any_encoding(command: list[str], encoding: str, folder: Path) -> None:
    result = run(command, encoding, folder)

    assert result.returncode == 0, result.stderr
    assert b"Traceback" not in result.stderr
    result.stdout.decode(encoding)


def test_data_is_utf_8_in_any_encoding(folder: Path) -> None:
    result = run(["inspect", NAME, "--json"], "latin-1", folder)

    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.decode("utf-8"))


def test_a_refusal_is_one_line_in_any_encoding(folder: Path) -> None:
    result = run(["check", f"{NAME}-absent.toml"], "gbk", folder)

    assert result.returncode == 2
    assert result.stderr.decode("gbk").count("\n") == 1
