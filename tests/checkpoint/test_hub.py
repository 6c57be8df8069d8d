"""Fetching from a hub: which files, for how long it is tried, and what happens to a file that is not what it says."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
import torch

from brlite.checkpoint.hub import HubFile, choose_files, download, find_cached
from brlite.checkpoint.progress import ignore_progress
from brlite.errors import ModelError
from tests.checkpoint.model_files import write_bin, write_safetensors


class FolderHub:
    """Implements `Hub` with a folder for the far side. Like the real cache, a snapshot holds links to the data."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository = repository
        self.cache = cache
        self.reachable = threading.Event()
        self.reachable.set()
        self.damaged: set[str] = set()

    def cached(self, name: str, files: list[str]) -> Path:
        if not (self.cache / "snapshot").is_dir():
            raise OSError("no snapshot")
        return self.cache / "snapshot"

    def list_files(self, name: str) -> list[HubFile]:
        self.reachable.wait()
        contents = {file.name: file.read_bytes() for file in self.repository.iterdir()}
        return [HubFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in sorted(contents.items())]

    def folder(self, name: str) -> Path:
        return self.cache

    def download(self, name: str, files: list[str]) -> Path:
        for part in ("blobs", "snapshot"):
            (self.cache / part).mkdir(parents=True, exist_ok=True)
        for file in files:
            data = (self.repository / file).read_bytes()
            blob = self.cache / "blobs" / f"blob-{file}"
            blob.write_bytes(data[::-1] if file in self.damaged else data)
            (self.cache / "snapshot" / file).symlink_to(blob)
        return self.cache / "snapshot"


@pytest.fixture
def hub(tmp_path: Path) -> FolderHub:
    repository = write_safetensors(tmp_path / "repository", {"w": torch.arange(4.0)})
    for name in ("tokenizer.json", "README.md", "modeling_evil.py", "pytorch_model.bin"):
        (repository / name).write_text(name)
    return FolderHub(repository, tmp_path / "cache")


def test_a_model_is_downloaded_without_code_and_without_a_second_format(hub: FolderHub) -> None:
    folder = download(hub, "some/model", ignore_progress)

    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_bin_files_are_taken_where_there_are_no_safetensors(tmp_path: Path) -> None:
    hub = FolderHub(write_bin(tmp_path / "repository", {"w": torch.arange(4.0)}), tmp_path / "cache")

    folder = download(hub, "some/model", ignore_progress)

    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "pytorch_model.bin"]


def test_a_damaged_file_is_refused_and_not_kept(hub: FolderHub) -> None:
    hub.damaged.add("model.safetensors")

    with pytest.raises(ModelError, match=r"model\.safetensors has sha256 \w{64}, but \w{64} was expected"):
        download(hub, "some/model", ignore_progress)

    assert not (hub.cache / "snapshot" / "model.safetensors").is_symlink()
    assert not (hub.cache / "blobs" / "blob-model.safetensors").exists()
    with pytest.raises(ModelError, match="no weights"):
        find_cached(hub, "some/model")


def test_a_file_that_did_not_come_is_named(hub: FolderHub) -> None:
    class LazyHub(FolderHub):
        def download(self, name: str, files: list[str]) -> Path:
            return super().download(name, [file for file in files if file != "tokenizer.json"])

    with pytest.raises(ModelError, match=r"tokenizer\.json was not downloaded"):
        download(LazyHub(hub.repository, hub.cache), "some/model", ignore_progress)


def test_a_silent_hub_is_given_up(hub: FolderHub) -> None:
    hub.reachable.clear()

    try:
        with pytest.raises(ModelError, match=r"no answer within 0\.01 s"):
            download(hub, "some/model", ignore_progress, reach_seconds=0.01)
    finally:
        hub.reachable.set()


def test_what_the_library_raises_becomes_one_line(tmp_path: Path) -> None:
    hub = FolderHub(tmp_path / "no repository", tmp_path)

    with pytest.raises(ModelError, match="No such file") as refusal:
        download(hub, "some/model", ignore_progress)

    assert "\n" not in str(refusal.value)


def test_a_snapshot_on_this_machine_is_found(hub: FolderHub) -> None:
    folder = download(hub, "some/model", ignore_progress)

    found = find_cached(hub, "some/model")

    assert found == folder


def test_a_download_reports_its_progress_to_the_end(hub: FolderHub) -> None:
    seen: list[tuple[str, float]] = []

    download(hub, "some/model", lambda stage, fraction: seen.append((stage, fraction)))

    assert seen[0] == ("downloading some/model", 0.0)
    assert ("downloading some/model", 1.0) in seen
    assert seen[-1] == ("checking tokenizer.json", 1.0)


def test_only_the_usual_names_at_the_top_count_as_weights() -> None:
    names = ["config.json", "consolidated.safetensors", "onnx/model.safetensors", "model.fp16.safetensors"]

    with pytest.raises(ModelError, match="neither"):
        choose_files([HubFile(name, 1, None) for name in names])


def test_shards_come_with_their_index() -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    files = [HubFile(name, 1, None) for name in (*names, "pytorch_model-00001-of-00002.bin")]

    chosen = choose_files(files)

    assert [file.name for file in chosen] == names
