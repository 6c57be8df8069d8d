"""Models by name from the Hugging Face hub, and from the cache that its library keeps on this machine.

Only configs, tokenizers and weights are fetched, never code. The library decides about endpoint, proxies, tokens,
offline mode and its cache folder; this file decides which files, for how long to try, and checks what came.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from brlite.checkpoint.folder import find_weights
from brlite.checkpoint.progress import OnProgress, growth_reported
from brlite.checkpoint.sha256 import check_sha256
from brlite.errors import ModelError
from brlite.files.quoting import excerpt, reason
from brlite.process.waiting import start_daemon

REACH_VARIABLE = "HF_HUB_ETAG_TIMEOUT"  # the library's own: how long the hub may take to tell what there is
SHORT_REACH_SECONDS = 3.0  # where another source could serve the model, and the variable is not set
MODEL_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)

COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
SAFETENSORS_FILES = ("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors")
BIN_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-?????-of-?????.bin")

T = TypeVar("T")


class HubFile(NamedTuple):
    """A file as the hub lists it; `sha256` is known for the large ones."""

    name: str
    num_bytes: int
    sha256: str | None


class Hub(Protocol):
    """What is needed of a hub. Any exception means that it cannot serve the model."""

    def cached(self, name: str, files: list[str]) -> Path:
        """The folder of a snapshot that is on this machine already."""
        ...

    def list_files(self, name: str) -> list[HubFile]: ...

    def folder(self, name: str) -> Path:
        """Where a download of this model grows."""
        ...

    def download(self, name: str, files: list[str]) -> Path:
        """Fetch these files and return the folder that holds them."""
        ...


class HuggingFaceHub:
    """Implements `Hub` with the `huggingface_hub` library."""

    def cached(self, name: str, files: list[str]) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(name, local_files_only=True, allow_patterns=files))
        except LocalEntryNotFoundError:
            raise ModelError("no complete snapshot on this machine") from None

    def list_files(self, name: str) -> list[HubFile]:
        from huggingface_hub import HfApi

        timeout = reach_limit(has_other_source=False)
        siblings = HfApi().model_info(name, files_metadata=True, timeout=timeout).siblings or []
        return [HubFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None) for file in siblings]

    def folder(self, name: str) -> Path:
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        return Path(constants.HF_HUB_CACHE) / str(repo_folder_name(repo_id=name, repo_type="model"))

    def download(self, name: str, files: list[str]) -> Path:
        from huggingface_hub import snapshot_download

        with _without_bars():
            return Path(snapshot_download(name, allow_patterns=files))


def reach_limit(*, has_other_source: bool) -> float:
    """How many seconds the hub has for its first answer: as the library's variable says, 10 by its default.

    Imports the library, which a slow disk can make last longer than that: the clock starts afterwards.
    """
    from huggingface_hub import HfApi, constants  # noqa: F401

    is_told = REACH_VARIABLE in os.environ
    return SHORT_REACH_SECONDS if has_other_source and not is_told else float(constants.HF_HUB_ETAG_TIMEOUT)


def find_cached(hub: Hub, name: str) -> Path:
    """The complete snapshot of a model that the hub's library has on this machine. Raises `ModelError` if none is."""
    check_name(name)
    folder = _ask(lambda: hub.cached(name, [*COMPANION_FILES, *SAFETENSORS_FILES]))
    find_weights(folder)
    return folder


def download(hub: Hub, name: str, on_progress: OnProgress, reach_seconds: float) -> Path:
    """Fetch a model into the library's cache and check its large files. A file that fails is removed again.

    A hub that does not answer within `reach_seconds` counts as unreachable; the download itself may take its time.
    """
    check_name(name)
    wanted = choose_files(_ask(lambda: _within(reach_seconds, lambda: hub.list_files(name))))
    total = sum(file.num_bytes for file in wanted)
    with growth_reported(hub.folder(name), total, f"downloading {name}", on_progress):
        folder = _ask(lambda: hub.download(name, [file.name for file in wanted]))
    for file in wanted:
        _check(folder / file.name, file, on_progress)
    find_weights(folder)
    return folder


def choose_files(files: list[HubFile]) -> list[HubFile]:
    """Config, tokenizer and safetensors; `.bin` where there are no safetensors."""
    for weights in (SAFETENSORS_FILES, BIN_FILES):
        if any(_matches(file, weights) for file in files):
            return [file for file in files if _matches(file, (*COMPANION_FILES, *weights))]
    raise ModelError("the repository holds neither model.safetensors nor pytorch_model.bin")


def check_name(name: str) -> None:
    """Raise `ModelError` unless this can be the name of a model on the hub."""
    if not MODEL_NAME.fullmatch(name) or ".." in name:
        raise ModelError(f"{excerpt(name)} is not a model name such as organisation/model")


def _matches(file: HubFile, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(file.name, pattern) for pattern in patterns)


def _check(path: Path, file: HubFile, on_progress: OnProgress) -> None:
    try:
        if file.sha256 is not None:
            check_sha256(path, file.sha256, on_progress)
    except OSError as error:
        raise ModelError(f"{file.name} was not downloaded: {reason(error)}") from error
    except ModelError:
        path.resolve().unlink()  # the snapshot holds a link to the data
        path.unlink(missing_ok=True)
        raise


def _ask(question: Callable[[], T]) -> T:
    """Turn whatever the library raises into `ModelError`."""
    try:
        return question()
    except ModelError:
        raise
    # Its own errors, requests', httpx's or the system's, depending on its version: there is no common class to catch.
    except Exception as error:
        raise ModelError(reason(error)) from error


def _within(seconds: float, question: Callable[[], T]) -> T:
    """Wait for an answer, but not for longer: name servers and proxies know time limits of their own only."""
    answer = start_daemon(question, "brlite-hub")
    if not wait([answer], timeout=seconds).done:
        raise ModelError(f"no answer within {seconds:g} s ({REACH_VARIABLE} sets the time)")
    return answer.result()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the library's own progress bars off the terminal: ours is there."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
