"""`brlite doctor`: what was found on this machine, and which path will run. Changes and fetches nothing."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import brlite
from brlite.config import DEFAULT_MODEL
from brlite.errors import ModelError
from brlite.machine import find_instruction_sets, find_memory, show_bytes

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "gguf", "aiohttp", "msgspec", "uvloop")
BIREN_NODES = "biren*"

Findings = dict[str, str]


def run(*, as_json: bool) -> int:
    """Print the findings. Returns 1 if nothing could be served here because torch cannot be used."""
    report = examine()
    print(json.dumps(report, indent=2, ensure_ascii=False) if as_json else render(report))
    return 1 if "error" in report["device"] else 0


def examine() -> dict[str, Findings]:
    """Section → what was found there."""
    sections: Mapping[str, Callable[[], Findings]] = {
        "versions": _versions,
        "machine": _machine,
        "device": _device,
        "model": _model,
    }
    return {name: find() for name, find in sections.items()}


def render(report: Mapping[str, Mapping[str, str]]) -> str:
    """Aligned lines under their section's name."""
    width = max(len(name) for findings in report.values() for name in findings)
    lines = []
    for section, findings in report.items():
        lines += [section, *(f"  {name:{width}}  {text}" for name, text in findings.items())]
    return "\n".join(lines)


def _versions() -> Findings:
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return {"brlite": brlite.__version__, "python": python, **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _machine() -> Findings:
    memory = find_memory()
    return {
        "instruction sets": " ".join(find_instruction_sets()) or "unknown",
        "hardware threads": str(os.cpu_count()),
        "memory": f"{show_bytes(memory.total)}, {show_bytes(memory.available)} free",
        "biren nodes": " ".join(sorted(map(str, Path("/dev").glob(BIREN_NODES)))) or "none",
    }


def _device() -> Findings:
    try:
        from brlite.worker.device import compute_dtype, describe_device, physical_cores, select_device
    except (ImportError, OSError) as error:  # a torch build that does not fit the machine fails to load with either
        return {"error": f"torch cannot be used: {' '.join(str(error).split())}"}
    device = select_device("auto")
    return {
        "chosen": describe_device(device),
        "computes in": str(compute_dtype("auto", device)).removeprefix("torch."),
        "threads": f"{physical_cores()}, one for each physical core",
        "path": "torch; native kernels are not built in this version",
    }


def _model() -> Findings:
    from brlite.checkpoint.fetch import default_cache, local_sources, locate_model

    try:
        place = str(locate_model(DEFAULT_MODEL, None, sources=local_sources()))
    except ModelError:
        place = "not here yet, fetched at the first start"
    return {"cache": str(default_cache()), "default model": DEFAULT_MODEL, "its weights": place}
