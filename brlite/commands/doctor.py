"""`brlite doctor`: shows what this machine has, and what will compute models. Changes and downloads nothing."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Collection, Mapping
from importlib import metadata
from pathlib import Path

import brlite
from brlite.backends.native.build import find_compiler
from brlite.backends.native.library import NativeLibrary, find_library, run_self_tests
from brlite.backends.native.nodes import show_nodes
from brlite.backends.sizes import known_sizes
from brlite.backends.torch.device import BIREN_NODES
from brlite.checkpoint.fetch import local_sources, locate_model
from brlite.config.options import DEFAULT_MODEL, EngineConfig, ModelSpec
from brlite.errors import ConfigError, MissingExtra, ModelError, NativeUnavailable
from brlite.files.cache import default_cache
from brlite.process.machine import find_cpus, find_instruction_sets, find_memory, find_nodes, show_bytes

PACKAGES = ("aiohttp", "msgspec", "numpy", "tokenizers", "sentencepiece", "gguf", "huggingface_hub", "uvloop")
EXTRAS = {"torch": "cards, tensor parallelism over machines, .bin files", "ray": "Ray Serve"}  # package: what needs it
ABSENT = "not installed"
NOTHING_COMPUTES = "nothing computes models here"

Findings = dict[str, str]


def run(args: argparse.Namespace) -> int:
    """Print the findings. Returns 1 if neither torch nor native kernels can compute a model."""
    report = examine()
    print(json.dumps(report, indent=2, ensure_ascii=False) if args.json else render(report))
    return 1 if report["serve"]["models are computed by"].startswith(NOTHING_COMPUTES) else 0


def examine() -> dict[str, Findings]:
    """Section → name → finding."""
    python = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    extras = {name: _version(name) for name in EXTRAS}
    report = {
        "versions": {"brlite": brlite.__version__, "python": python, **{name: _version(name) for name in PACKAGES}},
        "extras": {
            name: version if version != ABSENT else f"{ABSENT} ({EXTRAS[name]}): pip install 'brlite[{name}]'"
            for name, version in extras.items()
        },
    }
    sections: Mapping[str, Callable[[], Findings]] = {
        "machine": _machine,
        "native kernels": describe_native,
        "torch": _torch,
        "model": _model,
    }
    for name, find in sections.items():
        try:
            report[name] = find()
        except OSError as error:  # such as a folder that cannot be searched: the other sections are still shown
            report[name] = {"error": f"{error.filename}: {error.strerror}" if error.filename else str(error)}

    native, torch = report["native kernels"], report["torch"]
    if torch.get("device", "cpu").partition(" ")[0] != "cpu":
        backend = f"torch on {torch['device']}"
    elif "error" not in native:
        backend = "native kernels"
    elif "device" in torch:
        backend = "torch, several times slower than native kernels"
    else:
        backend = f"{NOTHING_COMPUTES}: {native['error']}; or: pip install 'brlite[torch]'"
    return {**report, "serve": {"models are computed by": backend}}


def render(report: Mapping[str, Mapping[str, str]]) -> str:
    """Aligned lines under their section's name."""
    width = max(len(name) for findings in report.values() for name in findings)
    lines = []
    for section, findings in report.items():
        lines += [section, *(f"  {name:{width}}  {text}" for name, text in findings.items())]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ABSENT


def _machine() -> Findings:
    memory, cpus = find_memory(), find_cpus()
    limit = f"; limited by {memory.decided_by}" if memory.decided_by else ""
    fewer = "; fewer while other programs use the cores (engine.adaptive_threads)" if cpus.num_threads > 1 else ""
    return {
        "instruction sets": " ".join(find_instruction_sets()) or "unknown",
        "hardware threads": str(os.cpu_count()),
        "threads": f"{cpus.num_threads}, {cpus.decided_by}{fewer}",
        "memory": f"{show_bytes(memory.total)}, {show_bytes(memory.available)} free{limit}",
        "NUMA nodes": describe_nodes(find_nodes()),
        "biren nodes": " ".join(sorted(map(str, Path("/dev").glob(BIREN_NODES)))) or "none",
    }


def describe_nodes(nodes: Mapping[int, Collection[int]]) -> str:
    """What brlite does with the nodes that `find_nodes` has found."""
    if not nodes:
        return "1"
    shown = ", ".join(f"node {node} with {len(cpus)} CPUs" for node, cpus in nodes.items())
    targets = [node for node, cpus in nodes.items() if cpus] or list(nodes)
    where = show_nodes(targets)
    if len(targets) == 1:
        return f"{shown}; the weights are kept on {where}"
    return f"{shown}; weights are spread over {where}; tensor_parallel = {len(targets)} gives each its own"


def _torch() -> Findings:
    from brlite.backends.torch.device import (
        BIREN_ENVIRONMENT,
        compute_dtype,
        describe_device,
        has_biren_cards,
        rules_for,
        select_device,
    )

    try:
        device = select_device("auto")
        dtype = compute_dtype("auto", device)
    except MissingExtra as missing:
        return {"not used": str(missing)}
    findings = {
        "device": describe_device(device),
        "computes in": str(dtype).removeprefix("torch."),
    }
    if has_biren_cards():
        findings[BIREN_ENVIRONMENT] = os.environ[BIREN_ENVIRONMENT]
    if rules_for(device).is_probed:
        from brlite.backends.torch.probe import probe_device

        try:
            findings["probe"] = str(probe_device(device, dtype))
        except ConfigError as refusal:
            findings["error"] = str(refusal)
    return findings


def describe_native(find: Callable[[], NativeLibrary | None] | None = None) -> Findings:
    """The native library's path, instruction set and self-tests, or why it cannot be used."""
    try:
        library = (find or find_library)()
        if library is None:
            return {"library": f"not built yet, compiled with {find_compiler()[0]} at the first start"}
    except NativeUnavailable as error:
        return {"error": str(error)}
    results = run_self_tests(library.functions).items()
    tests = (f"{name} {f'fails check {check} and is not used' if check else 'passed'}" for name, check in results)
    return {"library": str(library.path), "instruction set": library.isa_name, "self-tests": ", ".join(tests)}


def _model() -> Findings:
    try:
        sizes = known_sizes(ModelSpec(), EngineConfig())
        precision = sizes.precision if sizes is not None else "unknown until it is there"
    except (ModelError, ConfigError) as error:
        precision = str(error)
    try:
        place = str(locate_model(DEFAULT_MODEL, None, sources=local_sources))
    except ModelError:
        place = "not here yet, fetched at the first start"
    found = {"default model": DEFAULT_MODEL, "its weights": place, "its precision": precision}
    return {"cache": str(default_cache()), **found}
