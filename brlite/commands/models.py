"""`brlite pull` downloads a model; `brlite models` lists, shows and removes those on this machine.

It looks in the cache folders of the hubs and of brlite, and reads headers only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from brlite.backends.sizes import sizes_at
from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.fetch import local_sources, locate_model, remote_sources
from brlite.checkpoint.folder import WEIGHT_NAMES, has_weights
from brlite.checkpoint.hub import HuggingFaceHub, ModelScopeHub
from brlite.checkpoint.model_file import gguf_models, part_names
from brlite.checkpoint.model_name import quantization_of
from brlite.checkpoint.progress import progress_bar
from brlite.checkpoint.repository import FOLDER_PREFIX, Repository, cached_repositories
from brlite.config.options import EngineConfig, ModelSpec
from brlite.errors import BrliteError, ConfigError, ModelError
from brlite.files.cache import default_cache
from brlite.files.quoting import one_line, reason, shown
from brlite.models.registry import find_family
from brlite.process.machine import show_bytes

DAY_SECONDS = 86_400
PACKED_FOLDERS = ("native", "packed", "modelscope")  # folders of brlite's cache that are no models


class CachedModel(NamedTuple):
    """A model on this machine: a folder or a GGUF file. `problem` is why it cannot be served."""

    name: str
    path: Path
    disk_bytes: int
    precision: str
    architecture: str
    memory_bytes: int | None
    context: int | None
    used_at: float
    problem: str | None


def run(args: argparse.Namespace) -> int:
    """Run `brlite pull`, or `brlite models [list|show|rm]`. Raises `ModelError` for a name that is not here."""
    if args.action == "pull":
        return pull(args.name)
    if args.action == "rm":
        return remove(args.name, is_agreed=args.yes)
    if args.action == "show":
        found = [find_model(args.name)]
        text = details(found[0])
    else:
        found = list(find_models())
        text = render(found) if found else "no models are here yet; `brlite pull NAME` fetches one"
    if args.json:
        listed = [{**model._asdict(), "path": str(model.path), "used_at": int(model.used_at)} for model in found]
        text = json.dumps(listed, indent=1, ensure_ascii=False)
    print(shown(text))
    return 0


def pull(name: str) -> int:
    """Ask the hub for the newest files, download those that are missing, and print where the model is.

    If the hub cannot be reached but the model is on this machine, only a message is printed. Raises `ModelError` if the
    model is not found.
    """
    try:
        with progress_bar() as show:
            found = locate_model(name, None, show, sources=remote_sources)
    except ModelError as error:
        try:
            found = locate_model(name, None, sources=local_sources)
        except ModelError:
            raise error from error.__cause__
        print(f"brlite: not brought up to date: {shown(str(error))}", file=sys.stderr)
    print(found)
    return 0


def find_models() -> Iterator[CachedModel]:
    """Every model in the caches by name, also those whose download is incomplete."""
    cache = default_cache()
    for folder in sorted(cache.iterdir()) if cache.is_dir() else ():
        if folder.is_dir() and folder.name not in PACKED_FOLDERS and has_weights(folder):
            yield _describe(folder.name.replace("--", "/", 1), folder)
    for prefix, hub in (("", HuggingFaceHub()), ("modelscope:", ModelScopeHub())):
        for repository in cached_repositories(hub.cache()):
            found = [(file, path) for snapshot in repository.snapshots()[:1] for file, path in _models_in(snapshot)]
            for quantization, path in found:
                yield _describe(f"{prefix}{repository.name}{f':{quantization}' if quantization else ''}", path)
            has_parts = repository.has_parts()
            if has_parts or not found:
                state = "its download was interrupted: `brlite pull` resumes it" if has_parts else "no weights"
                model = CachedModel(
                    prefix + repository.name, repository.folder, repository.num_bytes(), "", "", None, None, 0.0, state
                )
                yield model


def render(found: list[CachedModel]) -> str:
    """A table of the models, a line each."""
    rows = [("NAME", "ON DISK", "WEIGHTS", "MEMORY", "USED")]
    for model in found:
        memory = show_bytes(model.memory_bytes) if model.memory_bytes is not None else "-"
        note = f"  ({model.problem})" if model.problem else ""
        used = _ago(model.used_at) if model.used_at else "-"
        rows.append((model.name, show_bytes(model.disk_bytes), model.precision or "-", memory, used + note))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:4], widths, strict=True)), row[4]]) for row in rows
    )


def details(model: CachedModel) -> str:
    """The known facts about one model, a line each."""
    findings = {
        "name": model.name,
        "path": str(model.path),
        "on disk": show_bytes(model.disk_bytes),
        "architecture": model.architecture,
        "weights": model.precision,
        "memory": show_bytes(model.memory_bytes) if model.memory_bytes is not None else "",
        "context": f"{model.context} tokens" if model.context else "",
        "used": _ago(model.used_at) if model.used_at else "",
        "problem": model.problem or "",
    }
    return "\n".join(f"{name:12}  {text}" for name, text in findings.items() if text)


def _models_in(snapshot: Path) -> Iterator[tuple[str | None, Path]]:
    """(quantization or file name of a GGUF model, its file or first part), or (None, the folder) of other weights."""
    names = gguf_models(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*.gguf"))
    files = [snapshot / name for name in names if (snapshot / name).is_file()]
    quantizations = [quantization_of(path.name) for path in files]
    for file, quantization in zip(files, quantizations, strict=True):
        is_only = quantizations.count(quantization) == 1
        yield quantization if quantization and is_only else file.name, file
    if any((snapshot / name).exists() for name in WEIGHT_NAMES):
        yield None, snapshot


def _describe(name: str, path: Path) -> CachedModel:
    """The model at `path` by its headers. Memory and context are those with the default config."""
    found = map(Path, part_names(str(path))) if path.is_file() else path.rglob("*")
    files = [file for file in found if file.is_file()]
    status = [file.stat() for file in files]
    disk_bytes, used_at = sum(each.st_size for each in status), max((each.st_atime for each in status), default=0.0)
    memory = context = problem = None
    precision = architecture = ""
    try:
        checkpoint = open_checkpoint(path)
        architecture = find_family(checkpoint.config).architecture
        weights = checkpoint.path if checkpoint.path.is_file() else None
        stored = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or ""  # the second until 4.56
        precision = (weights and quantization_of(weights.name)) or one_line(stored)
        sizes = sizes_at(path, ModelSpec(name="model"), EngineConfig())
        memory, context = sizes.num_bytes, sizes.context
    except (BrliteError, OSError) as error:
        problem = one_line(error).replace(f"{path}: ", "")
    return CachedModel(name, path, disk_bytes, precision, architecture, memory, context, used_at, problem)


def find_model(name: str) -> CachedModel:
    """The model with this name; case is ignored, :QUANT is optional. Raises `ModelError` for none or several."""
    found = {model.name: model for model in find_models()}
    wanted = name.removeprefix("hf:")
    matches = [
        model for each, model in found.items() if wanted.lower() in (each.lower(), each.lower().partition(":")[0])
    ]
    if wanted in found or len(matches) == 1:
        return found.get(wanted) or matches[0]
    if matches:
        raise ModelError(f"{name}: name one of {', '.join(model.name for model in matches)}")
    near = get_close_matches(name, found, 1)
    hint = f"did you mean {near[0]}?" if near else "`brlite models` lists what is here"
    raise ModelError(f"{name} is not on this machine; {hint}")


def remove(name: str, *, is_agreed: bool) -> int:
    """Remove a model: its files if it is one of several in its snapshot, else the whole folder. Asks unless agreed."""
    model = find_model(name)
    if not is_agreed:
        if not sys.stdin.isatty():
            raise ConfigError(f"models rm {name}: add --yes where nobody can be asked")
        print(shown(f"remove {model.name}, {show_bytes(model.disk_bytes)} at {model.path}? [y/N] "), end="", flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("nothing was removed")
            return 0
    folder = next((path for path in (model.path, *model.path.parents) if path.name.startswith(FOLDER_PREFIX)), None)
    try:
        if folder is None:
            shutil.rmtree(model.path)
        else:
            repository = Repository(folder.parent, folder.name.removeprefix(FOLDER_PREFIX).replace("--", "/", 1))
            snapshots = repository.snapshots()
            if model.path.is_file() and snapshots and len(list(_models_in(snapshots[0]))) > 1:
                for part in part_names(str(model.path.relative_to(snapshots[0]))):
                    repository.remove_file(snapshots[0], part)
            else:
                repository.remove()
    except OSError as error:
        raise ModelError(f"{model.path}: {reason(error)}") from error
    print(shown(f"removed {model.name}"))
    return 0


def _ago(moment: float) -> str:
    days = int((time.time() - moment) // DAY_SECONDS)
    return "today" if days < 1 else "yesterday" if days == 1 else f"{days} days ago"
