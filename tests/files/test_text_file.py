"""Text that people write, as other programs save it: with a byte order mark, with CR LF, in UTF-16, from a pipe."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from brlite.chat.template import read_template
from brlite.commands.generate import read_lines
from brlite.config.load import load_config
from brlite.config.options import Config, KeysConfig
from brlite.errors import ConfigError, ModelError
from brlite.files.text_file import TextError, decode_text, read_text, unique_fields
from brlite.http.keys import ApiKeys

MARK = b"\xef\xbb\xbf"
TOML = b'[server]\nport = 1234\n\n[[model]]\nname = "m"\n'


def as_windows_saves(text: bytes) -> bytes:
    return MARK + text.replace(b"\n", b"\r\n")


def keys_of(path: Path) -> ApiKeys:
    return ApiKeys.from_config(Config(keys=KeysConfig(file=str(path))))


@pytest.mark.parametrize("save", [as_windows_saves, lambda text: MARK + text, lambda text: text])
def test_a_text_is_the_same_however_it_is_saved(save):
    assert decode_text(save("é\nb\n".encode())) == "é\nb\n"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_unicode_encoding_is_named(encoding):
    with pytest.raises(TextError, match=r"UTF-(16|32) text"):
        decode_text("sk-first\n".encode(encoding))


def test_what_is_no_unicode_at_all_says_where():
    with pytest.raises(TextError, match="byte 1 is not UTF-8"):
        decode_text(b"a\xff")


def test_a_leading_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "keys").write_text("sk-first")

    assert read_text(Path("~/keys")) == "sk-first"
    assert keys_of(Path("~/keys")).find("sk-first") is not None


def test_a_config_saved_on_windows_is_the_config(tmp_path):
    (tmp_path / "plain.toml").write_bytes(TOML)
    (tmp_path / "marked.toml").write_bytes(as_windows_saves(TOML))

    assert load_config(tmp_path / "marked.toml") == load_config(tmp_path / "plain.toml")


def test_the_manuals_json_saved_on_windows_is_the_config(tmp_path):
    source = next((Path(__file__).parents[1] / "fixtures" / "manual_configs").glob("*.json"))
    (tmp_path / "marked.json").write_bytes(as_windows_saves(source.read_bytes().replace(b"\r\n", b"\n")))

    assert load_config(tmp_path / "marked.json") == load_config(source)


def test_the_first_key_of_a_file_saved_on_windows_is_a_key(tmp_path):
    (tmp_path / "keys").write_bytes(as_windows_saves(b"sk-first\nsk-second\n"))

    keys = keys_of(tmp_path / "keys")

    assert keys.find("sk-first") is not None
    assert keys.find("sk-second") is not None
    assert keys.find("\ufeffsk-first") is None


def test_a_comment_behind_a_byte_order_mark_is_no_key(tmp_path):
    (tmp_path / "keys").write_bytes(as_windows_saves(b"# the team\nsk-second\n"))

    keys = keys_of(tmp_path / "keys")

    assert keys.find("\ufeff# the team") is None
    assert keys.find("# the team") is None


def test_a_key_file_in_utf_16_is_refused_by_name(tmp_path):
    (tmp_path / "keys").write_text("sk-first\n", encoding="utf-16")

    with pytest.raises(ConfigError, match="it is UTF-16 text; UTF-8 is needed"):
        keys_of(tmp_path / "keys")


def test_a_chat_template_saved_on_windows_writes_nothing_before_the_prompt(tmp_path):
    (tmp_path / "t.jinja").write_bytes(as_windows_saves(b"{{ messages }}\nend"))

    assert read_template(tmp_path / "t.jinja") == "{{ messages }}\nend"


def test_prompts_saved_on_windows_are_the_prompts(tmp_path):
    (tmp_path / "p.txt").write_bytes(as_windows_saves(b"one\ntwo\n"))

    assert list(read_lines(str(tmp_path / "p.txt"))) == [(1, "one"), (2, "two")]


@pytest.mark.parametrize("name", ["brlite.toml", "seed.json"])
def test_a_config_that_is_a_pipe_without_a_writer_is_given_up(name, tmp_path):
    os.mkfifo(tmp_path / name)

    with pytest.raises(TextError, match=r"did not end within 0\.05 s"):
        read_text(tmp_path / name, wait_seconds=0.05)


def test_a_pipe_is_read_to_its_end(tmp_path):
    os.mkfifo(tmp_path / "config.toml")
    writer = threading.Thread(target=(tmp_path / "config.toml").write_bytes, args=(MARK + TOML,))
    writer.start()

    config = load_config(tmp_path / "config.toml")
    writer.join()

    assert config.server.port == 1234


def test_an_endless_device_is_refused():
    with pytest.raises(TextError, match="larger than 1000 bytes"):
        read_text(Path("/dev/zero"), max_bytes=1000)


def test_a_folder_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(TextError, match="it is a directory"):
        read_text(tmp_path)
    with pytest.raises(TextError, match="No such file"):
        read_text(tmp_path / "absent")
    with pytest.raises(TextError, match="null"):
        read_text(tmp_path / "a\0b")
    with pytest.raises(ModelError, match=r"chat template .*: it is a directory"):
        read_template(tmp_path)


def test_a_terminal_free_device_is_an_empty_text():
    assert read_text(Path("/dev/null")) == ""


def test_json_lines_behind_a_byte_order_mark_are_json(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(MARK + json.dumps({"prompt": "hi"}).encode())

    assert list(read_lines(str(tmp_path / "p.jsonl"))) == [(1, '{"prompt": "hi"}')]


def test_a_field_that_an_object_has_twice_is_found_in_time_linear_in_its_fields():
    text = "{" + ",".join(f'"{number}": 0' for number in range(100_000)) + ', "99999": 1}'
    began = time.process_time()

    with pytest.raises(ValueError, match="'99999' is given twice in one object"):
        json.loads(text, object_pairs_hook=unique_fields)

    assert time.process_time() < began + 10  # one search for each field took 100 s
