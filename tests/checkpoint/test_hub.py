"""Fetching from a hub: which files, for how long it is tried, and what happens to a file that is not what it says."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from brlite.checkpoint.hub import HubFile, choose_files, download, find_cached, reach_limit
from brlite.checkpoint.progress import ignore_progress
from brlite.errors import ModelError
from tests.checkpoint.model_files import write_bin, write_safetensors

REACH = 60.0  # seconds; no test waits for them


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
    folder = download(hub, "some/model", ignore_progress, REACH)

    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_bin_files_are_taken_where_there_are_no_safetensors(tmp_path: Path) -> None:
    hub = FolderHub(write_bin(tmp_path / "repository", {"w": torch.arange(4.0)}), tmp_path / "cache")

    folder = download(hub, "some/model", ignore_progress, REACH)

    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "pytorch_model.bin"]


def test_a_damaged_file_is_refused_and_not_kept(hub: FolderHub) -> None:
    hub.damaged.add("model.safetensors")

    with pytest.raises(ModelError, match=r"model\.safetensors has sha256 \w{64}, but \w{64} was expected"):
        download(hub, "some/model", ignore_progress, REACH)

    assert not (hub.cache / "snapshot" / "model.safetensors").is_symlink()
    assert not (hub.cache / "blobs" / "blob-model.safetensors").exists()
    with pytest.raises(ModelError, match="no weights"):
        find_cached(hub, "some/model")


def test_a_file_that_did_not_come_is_named(hub: FolderHub) -> None:
    class LazyHub(FolderHub):
        def download(self, name: str, files: list[str]) -> Path:
            return super().download(name, [file for file in files if file != "tokenizer.json"])

    with pytest.raises(ModelError, match=r"tokenizer\.json was not downloaded"):
        download(LazyHub(hub.repository, hub.cache), "some/model", ignore_progress, REACH)


def test_a_silent_hub_is_given_up(hub: FolderHub) -> None:
    hub.reachable.clear()

    try:
        with pytest.raises(ModelError, match=r"no answer within 0\.01 s \(HF_HUB_ETAG_TIMEOUT"):
            download(hub, "some/model", ignore_progress, reach_seconds=0.01)
    finally:
        hub.reachable.set()


def test_what_the_library_raises_becomes_one_line(tmp_path: Path) -> None:
    hub = FolderHub(tmp_path / "no repository", tmp_path)

    with pytest.raises(ModelError, match="No such file") as refusal:
        download(hub, "some/model", ignore_progress, REACH)

    assert "\n" not in str(refusal.value)


def test_a_snapshot_on_this_machine_is_found(hub: FolderHub) -> None:
    folder = download(hub, "some/model", ignore_progress, REACH)

    found = find_cached(hub, "some/model")

    assert found == folder


def test_a_download_reports_its_progress_to_the_end(hub: FolderHub) -> None:
    seen: list[tuple[str, float]] = []

    download(hub, "some/model", lambda stage, fraction: seen.append((stage, fraction)), REACH)

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


SLOW_HUB = """
import http.server, json, sys, time

class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        time.sleep(float(sys.argv[1]))
        files = [{"rfilename": "README.md", "size": 2}]
        body = json.dumps({"id": "org/m", "sha": "a" * 40, "siblings": files}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
print(server.server_port, flush=True)
server.serve_forever()
"""
ASKS = "from brlite.checkpoint.fetch import locate_model; locate_model('org/m', None)"


def ask_slow_hub(folder: Path, hub_seconds: float, **environment: str) -> str:
    """What is said of a model that only a hub which answers after `hub_seconds` could have."""
    with subprocess.Popen([sys.executable, "-c", SLOW_HUB, str(hub_seconds)], stdout=subprocess.PIPE) as hub:
        try:
            assert hub.stdout is not None
            endpoint = f"http://127.0.0.1:{int(hub.stdout.readline())}"
            folders = {"HF_HOME": str(folder / "hf"), "BRLITE_CACHE": str(folder / "cache"), "HF_ENDPOINT": endpoint}
            asked = subprocess.run(
                [sys.executable, "-c", ASKS],
                env={**os.environ, **folders, **environment},
                capture_output=True,
                text=True,
                check=False,
            )
        finally:
            hub.kill()
    return asked.stderr.splitlines()[-1]


def test_a_hub_that_takes_four_seconds_is_waited_for(tmp_path: Path) -> None:
    assert "the repository holds neither model.safetensors" in ask_slow_hub(tmp_path, 4)


def test_the_librarys_own_limit_is_heard_and_named(tmp_path: Path) -> None:
    said = ask_slow_hub(tmp_path, 60, HF_HUB_ETAG_TIMEOUT="1")

    assert "no answer within 1 s (HF_HUB_ETAG_TIMEOUT sets the time)" in said or "timed out" in said


@pytest.mark.parametrize(("is_told", "has_other_source", "seconds"), [(0, 0, 10), (0, 1, 3), (1, 1, 10), (1, 0, 10)])
def test_only_where_another_source_could_serve_is_the_wait_short(
    is_told: int, has_other_source: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    if is_told:
        monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "10")

    assert reach_limit(has_other_source=bool(has_other_source)) == seconds
