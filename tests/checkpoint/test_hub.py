"""Fetching from hubs, with a real server on loopback: what is fetched, what goes wrong, and what is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.download import Download
from brlite.checkpoint.hub import find_cached
from brlite.checkpoint.hub_http import HubAddress, Retries
from brlite.checkpoint.model_name import parse_model_name
from brlite.checkpoint.progress import SizedStage, ignore_progress
from brlite.checkpoint.repository import COUNTS_SUFFIX, PART_SUFFIX, Repository, cached_repositories
from brlite.checkpoint.transfer import HubFile, Transfer, Wanted
from brlite.errors import ModelError
from tests.checkpoint.conftest import AT_ONCE, NAME, REACH, LocalHuggingFace, LocalModelScope, fetch, opener
from tests.checkpoint.hub_server import HubServer, files_of
from tests.checkpoint.model_files import write_gguf
from tests.limits import PATIENCE_SECONDS


def left_behind(hub: LocalHuggingFace) -> list[str]:
    return sorted(path.suffix for path in (Repository(hub.cache(), "org/model").folder / "blobs").iterdir())


def test_a_model_is_downloaded_without_code_and_without_a_second_format(hub: LocalHuggingFace) -> None:
    folder = fetch(hub)

    assert files_of(folder) == {
        name: hub.server.files[name] for name in ("config.json", "model.safetensors", "tokenizer.json")
    }
    assert find_cached(hub, NAME) == folder
    assert left_behind(hub) == ["", "", ""]


def test_the_cache_is_one_that_the_librarys_own_functions_read(hub: LocalHuggingFace) -> None:
    from huggingface_hub import scan_cache_dir, snapshot_download

    folder = fetch(hub)

    assert Path(snapshot_download("org/model", cache_dir=hub.cache(), local_files_only=True)) == folder
    (repository,) = scan_cache_dir(hub.cache()).repos
    assert repository.repo_id == "org/model"
    assert repository.refs.keys() == {"main"}


def test_what_is_there_is_not_fetched_again(hub: LocalHuggingFace) -> None:
    fetch(hub)
    sent = hub.server.sent_bytes

    fetch(hub)

    assert hub.server.sent_bytes == sent


def test_a_revision_has_a_reference_of_its_own(hub: LocalHuggingFace) -> None:
    folder = fetch(hub, "hf:org/model@v2")

    assert find_cached(hub, parse_model_name("hf:org/model@v2")) == folder
    assert find_cached(hub, parse_model_name(f"hf:org/model@{folder.name}")) == folder
    with pytest.raises(ModelError, match="no complete snapshot"):
        find_cached(hub, NAME)
    with pytest.raises(ModelError, match="org/model has no such revision"):
        fetch(hub, "hf:org/model@v3")


def test_a_repository_that_moved_is_followed_with_the_token_and_the_storage_never_sees_it(
    hub: LocalHuggingFace,
) -> None:
    hub.token = hub.server.token = "hf_secret"
    hub.server.moved_from = "old/name"

    folder = fetch(hub, "hf:old/name")

    assert (folder / "model.safetensors").is_file()
    assert hub.server.ranges  # the weights came from the storage
    assert hub.server.tokens_at_storage == []


def test_connections_that_are_cut_are_resumed_where_they_stopped(hub: LocalHuggingFace) -> None:
    size = len(hub.server.files["model.safetensors"])
    hub.server.cut_after = {"model.safetensors": 20_000}
    hub.server.cuts_left = 8  # more than a request may fail in a row: each brought some

    folder = fetch(hub)

    assert (folder / "model.safetensors").read_bytes() == hub.server.files["model.safetensors"]
    assert hub.server.ranges[:3] == [None, f"bytes=20000-{size - 1}", f"bytes=40000-{size - 1}"]


def test_a_connection_that_stalls_is_given_up_and_resumed(hub: LocalHuggingFace) -> None:
    class ImpatientHub(LocalHuggingFace):
        def address(self) -> HubAddress:
            return super().address()._replace(read_seconds=1.0)

    hub.server.stalls_left = 1

    folder = fetch(ImpatientHub(hub.server, hub.cache()))

    assert (folder / "model.safetensors").read_bytes() == hub.server.files["model.safetensors"]
    assert hub.server.ranges[1].startswith("bytes=5000-")  # type: ignore[union-attr]


def test_what_an_interrupted_download_left_is_no_model_and_is_resumed(hub: LocalHuggingFace) -> None:
    size = len(hub.server.files["model.safetensors"])
    hub.server.cut_after = {"model.safetensors": 0}
    hub.server.cuts_left = 99
    with pytest.raises(ModelError, match=r"model\.safetensors: the connection was cut; the bytes received are kept"):
        fetch(hub)
    hub.server.cut_after, hub.server.cuts_left = {"model.safetensors": 30_000}, 1
    hub.server.failures = []
    with pytest.raises(ModelError, match="no complete snapshot"):
        find_cached(hub, NAME)

    with pytest.raises(ModelError, match="the connection was cut"):
        Download(hub, NAME, ignore_progress, Retries(most=1)).run(REACH)
    assert PART_SUFFIX in left_behind(hub)
    assert COUNTS_SUFFIX in left_behind(hub)
    sent = hub.server.sent_bytes
    folder = fetch(hub)

    assert (folder / "model.safetensors").read_bytes() == hub.server.files["model.safetensors"]
    assert hub.server.ranges[-1] == f"bytes=30000-{size - 1}"
    assert hub.server.sent_bytes - sent == size - 30_000
    assert left_behind(hub) == ["", "", ""]


def test_a_part_of_another_size_is_begun_anew(hub: LocalHuggingFace) -> None:
    blobs = Repository(hub.cache(), "org/model").folder / "blobs"
    blobs.mkdir(parents=True)
    key = next(file.key for file in hub.list_files(hub.address(), NAME).files if file.name == "model.safetensors")
    (blobs / f"{key}{PART_SUFFIX}").write_bytes(b"x" * 100)
    (blobs / f"{key}{PART_SUFFIX}{COUNTS_SUFFIX}").write_bytes(b"\xff" * 24)

    folder = fetch(hub)

    assert (folder / "model.safetensors").read_bytes() == hub.server.files["model.safetensors"]


def test_a_file_of_another_hash_is_refused_and_not_kept(hub: LocalHuggingFace) -> None:
    hub.server.wrong_hash = {"model.safetensors"}

    with pytest.raises(ModelError, match=r"model\.safetensors has sha256 \w{64}, but \w{64} was expected"):
        fetch(hub)

    assert PART_SUFFIX not in left_behind(hub)
    with pytest.raises(ModelError, match="no complete snapshot"):
        find_cached(hub, NAME)


def test_files_that_cannot_be_opened_leave_no_descriptor_open(tmp_path: Path) -> None:
    (tmp_path / f"second{PART_SUFFIX}{COUNTS_SUFFIX}").mkdir()
    wanted = [Wanted(HubFile("config.json", 4), tmp_path / name) for name in ("first", "second")]

    with pytest.raises(IsADirectoryError):
        Transfer(lambda file, span: None, "test", ignore_progress).fetch(wanted)

    held = (os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
    assert [path for path in held if path.startswith(str(tmp_path))] == []


def test_a_small_file_is_checked_by_gits_hash(hub: LocalHuggingFace, tmp_path: Path) -> None:
    content = hub.server.files["config.json"]
    file = HubFile("config.json", len(content), None, "0" * 40)
    hub.server.files["config.json"] = content[::-1]

    with pytest.raises(ModelError, match=r"config\.json has sha1 \w{40}, but 0{40} was expected"):
        Transfer(opener(hub), "test", ignore_progress).fetch([Wanted(file, tmp_path / "config.json")])

    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_failure_that_passes_is_waited_out(status: int, hub: LocalHuggingFace) -> None:
    hub.server.failures = [(status, {"Retry-After": "0"}), (status, {})]

    folder = fetch(hub)

    assert (folder / "model.safetensors").is_file()


def test_a_server_without_ranges_is_read_from_the_start(hub: LocalHuggingFace, tmp_path: Path) -> None:
    hub.server.knows_ranges = False
    content = hub.server.files["model.safetensors"]
    listing = hub.list_files(hub.address(), NAME)
    file = next(file for file in listing.files if file.name == "model.safetensors")
    target = tmp_path / "model.safetensors"

    Transfer(opener(hub), "test", ignore_progress, segment_bytes=50_000).fetch([Wanted(file, target)])

    assert target.read_bytes() == content
    assert hub.server.ranges == ["bytes=0-49999"]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"sent_instead": {"model.safetensors": b"<html>Log in</html>"}}, "19 bytes are sent, where the list has "),
        ({"shift": 7, "cut_after": {"model.safetensors": 500}, "cuts_left": 1}, "not the bytes from 500 on"),
        ({"storage_refusal": 403}, ", to which the Hugging Face hub redirects, answers 403"),
    ],
    ids=["a page", "another range", "storage"],
)
def test_what_is_not_the_file_is_said_and_not_kept(hub: LocalHuggingFace, wrong: dict[str, Any], text: str) -> None:
    for name, value in wrong.items():
        setattr(hub.server, name, value)

    with pytest.raises(ModelError, match=text):
        fetch(hub)

    hub.server.shift, hub.server.storage_refusal = 0, None
    hub.server.sent_instead.clear()
    assert open_checkpoint(fetch(hub)).shapes()


def test_a_large_file_comes_in_segments_at_once(hub: LocalHuggingFace, tmp_path: Path) -> None:
    listing = hub.list_files(hub.address(), NAME)
    file = next(file for file in listing.files if file.name == "model.safetensors")
    hub.server.cut_after, hub.server.cuts_left = {"model.safetensors": 30_000}, 3
    seen: list[float] = []

    def watch(stage: str, fraction: float) -> None:
        assert isinstance(stage, SizedStage)
        seen.append(fraction)

    transfer = Transfer(opener(hub), "test", watch, retries=AT_ONCE, segment_bytes=50_000)
    transfer.fetch([Wanted(file, tmp_path / "model.safetensors")])

    assert (tmp_path / "model.safetensors").read_bytes() == hub.server.files["model.safetensors"]
    assert len(hub.server.ranges) > -(-file.num_bytes // 50_000)  # and those after a cut
    assert seen[0] == 0.0
    assert seen[-1] == 1.0


def test_modelscope_serves_the_same_from_its_own_paths(server: HubServer, tmp_path: Path) -> None:
    hub = LocalModelScope(server, tmp_path / "cache")
    server.cut_after, server.cuts_left = {"model.safetensors": 20_000}, 1

    folder = fetch(hub, "modelscope:org/model")

    assert files_of(folder).keys() == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (folder / "model.safetensors").read_bytes() == server.files["model.safetensors"]
    assert find_cached(hub, parse_model_name("modelscope:org/model")) == folder
    with pytest.raises(ModelError, match="there is no org/other"):
        fetch(hub, "modelscope:org/other")


def pulling(server: HubServer, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """A process that fetches the model."""
    program = "from brlite.checkpoint.fetch import locate_model; print(locate_model('org/model', None))"
    folders = {"HF_HOME": str(folder / "hf"), "BRLITE_CACHE": str(folder / "own"), "HF_ENDPOINT": server.endpoint}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, **folders, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_of_two_threads_one_downloads_and_the_other_waits(
    hub: LocalHuggingFace, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = threading.Event()
    monkeypatch.setattr("brlite.checkpoint.download.logger.warning", lambda *_: waits.set())
    hub.server.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        fetching = [pool.submit(fetch, hub) for _ in range(2)]
        one_waits = waits.wait(PATIENCE_SECONDS)
        hub.server.gate.set()

    assert one_waits
    assert fetching[0].result() == fetching[1].result()
    assert left_behind(hub) == ["", "", ""]


def test_of_two_processes_one_downloads_and_the_other_says_that_it_waits(server: HubServer, tmp_path: Path) -> None:
    server.gate.clear()
    with pulling(server, tmp_path) as first:
        assert server.started.wait(PATIENCE_SECONDS)
        with pulling(server, tmp_path) as second:
            assert second.stderr is not None
            assert "another download of org/model is under way: waiting for it" in second.stderr.readline()
            server.gate.set()
            paths = {process.communicate(timeout=PATIENCE_SECONDS)[0] for process in (first, second)}

    assert len(paths) == 1
    assert (Path(paths.pop().strip()) / "model.safetensors").is_file()
    assert server.seen["/model.safetensors"] == 1


def test_an_interrupt_leaves_at_once_and_keeps_what_came(server: HubServer, tmp_path: Path) -> None:
    server.gate.clear()
    with pulling(server, tmp_path) as process:
        assert server.started.wait(PATIENCE_SECONDS)

        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_SECONDS)

    (repository,) = cached_repositories(tmp_path / "hf" / "hub")
    assert repository.has_parts()
    assert repository.snapshot(None) is None


def test_a_part_is_found_beside_those_that_got_their_names_since_they_were_listed(tmp_path: Path) -> None:
    repository = Repository(tmp_path, "org/model")
    repository.blob("").mkdir(parents=True)
    for number in range(30):
        repository.blob(f"{number}{PART_SUFFIX}").symlink_to("renamed")  # listed, but not to be found
    without = repository.has_parts()

    repository.blob(f"last{PART_SUFFIX}").write_bytes(b"x")

    assert (without, repository.has_parts()) == (False, True)


def test_modelscope_is_chosen_by_the_environment(server: HubServer, tmp_path: Path) -> None:
    settings = {"BRLITE_HUB": "modelscope", "MODELSCOPE_DOMAIN": server.endpoint}

    with pulling(server, tmp_path, **settings) as process:
        found = process.communicate(timeout=PATIENCE_SECONDS)[0]

    assert found.startswith(str(tmp_path / "own" / "modelscope" / "models--org--model"))


def test_offline_nothing_is_asked(server: HubServer, tmp_path: Path) -> None:
    with pulling(server, tmp_path, HF_HUB_OFFLINE="1") as process:
        said = process.communicate(timeout=PATIENCE_SECONDS)[1].splitlines()[-1]

    assert said.endswith("model org/model was not found: the Hugging Face hub: not asked: HF_HUB_OFFLINE is set")
    assert not server.seen


def test_a_model_is_removed_whole_or_by_the_file(server: HubServer, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m-Q8_0.gguf").read_bytes()
    server.files = {
        "m-Q8_0.gguf": file,
        "m-Q4_K_M.gguf": write_gguf(tmp_path / "n.gguf", metadata={"x": 1}).read_bytes(),
    }
    hub = LocalHuggingFace(server, tmp_path / "cache")
    fetch(hub, "hf:org/model:Q8_0")
    snapshot = fetch(hub).parent
    repository = Repository(hub.cache(), "org/model")
    before = repository.num_bytes()

    repository.remove_file(snapshot, "m-Q8_0.gguf")

    assert before - repository.num_bytes() == len(file)
    assert find_cached(hub, NAME).name == "m-Q4_K_M.gguf"
    repository.remove()
    assert cached_repositories(hub.cache()) == []
    shutil.rmtree(hub.cache())


def test_the_librarys_time_limit_is_kept_and_named(server: HubServer, tmp_path: Path) -> None:
    server.failures = [(503, {"Retry-After": "30"})] * 9

    with pulling(server, tmp_path, HF_HUB_ETAG_TIMEOUT="1") as process:
        said = process.communicate(timeout=PATIENCE_SECONDS)[1].splitlines()[-1]

    assert "the Hugging Face hub: 127.0.0.1" in said
    assert "answers 503 Service Unavailable; it allows no request for 30 s" in said


def test_the_token_of_the_environment_is_sent(server: HubServer, tmp_path: Path) -> None:
    server.token = "hf_secret"
    with pulling(server, tmp_path) as process:
        refused = process.communicate(timeout=PATIENCE_SECONDS)[1]
    with pulling(server, tmp_path, HF_TOKEN="hf_secret") as process:
        found = process.communicate(timeout=PATIENCE_SECONDS)[0]

    assert "then set HF_TOKEN to a token of that account" in refused.splitlines()[-1]
    assert "snapshots" in found
