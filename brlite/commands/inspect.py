"""`brlite inspect`: shows what a model file or folder contains, from its headers. Loads and runs nothing.

Takes a traced `.pt` (for the names that the manual's config needs), a bundle, a Hugging Face folder, a GGUF file or
packed weights.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brlite.backends.native.packed_file import MAGIC, PackedFileError, read_packed_file_key
from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.bundle import BundleCheckpoint, is_bundle
from brlite.checkpoint.checkpoint import naming
from brlite.checkpoint.folder import find_weights
from brlite.checkpoint.traced_checkpoint import TracedArchive
from brlite.commands.convert import located
from brlite.errors import ModelError
from brlite.files.new_file import read_record
from brlite.files.quoting import one_line
from brlite.models.network import num_parameters
from brlite.models.registry import find_family
from brlite.process.machine import show_bytes

UNREADABLE = "unknown: the graph's text cannot be read"
EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight")  # as the families call them

Findings = dict[str, Any]


def run(args: argparse.Namespace) -> int:
    """Print the findings. Returns 1 if `--verify` finds a file of the bundle whose sha256 differs."""
    path = located(args.path)
    findings = inspect(path)
    if args.verify:
        findings["damaged files"] = damaged_files(path)
    print(json.dumps(findings, indent=1) if args.json else render(findings))
    return 1 if findings.get("damaged files") else 0


def inspect(path: Path) -> Findings:
    """Name → finding. Raises `ModelError` for a file or folder of another kind, or a broken one."""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
        if start == MAGIC:
            return _packed_file(path)
        if start.startswith(b"PK"):
            return _traced(path)
    return _bundle(path) if is_bundle(path) else _checkpoint(path)


def render(findings: Mapping[str, Any]) -> str:
    """A line for each finding."""
    width, lines = max(map(len, findings)), []
    for name, value in findings.items():
        text = UNREADABLE if value is None else one_line(value)
        if isinstance(value, int) and name.endswith("bytes"):
            text = f"{value} ({show_bytes(value)})"
        elif isinstance(value, int) and name == "parameters":
            text = f"{value} ({value / 1e6:.4g} million)"
        elif isinstance(value, list | tuple):
            text = ", ".join(one_line(item) for item in value) or "none"
        lines.append(f"{name:{width}}  {text}")
    return "\n".join(lines)


def _traced(path: Path) -> Findings:
    archive = TracedArchive(path)
    tensors, names = archive.parameters(), archive.graph_names()
    embedding = next((tensor for name, tensor in tensors.items() if name.endswith(EMBEDDINGS)), None)
    return {
        "kind": "traced .pt",
        "path": str(path),
        "bytes": archive.num_bytes,
        "class": archive.module.type_name.rpartition(".")[2],
        "input_name": names and names.input_name,
        "output's key": (names and names.output_key) or "none",
        "vocab_size": embedding.shape[0] if embedding else "unknown: no embedding was found",
        "tensors": len(tensors),
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors.values()),
        "types": _counted(tensor.format.name for tensor in tensors.values()),
    }


def _bundle(path: Path) -> Findings:
    checkpoint = BundleCheckpoint(path)
    manifest = checkpoint.manifest
    return {
        "kind": "bundle",
        "path": str(path),
        "bytes": sum(record.num_bytes for record in manifest.files.values()),
        "model": manifest.model,
        "architecture": manifest.architecture,
        "precision": manifest.precision,
        "input_name": manifest.input_name,
        "output_name": manifest.output_name,
        "vocab_size": manifest.vocab_size,
        "parameters": manifest.num_parameters,
        "identity": checkpoint.identity,
        "brlite": manifest.brlite,
        "files": list(manifest.files),
    }


def _checkpoint(path: Path) -> Findings:
    checkpoint = open_checkpoint(path)
    with naming(path):
        family = find_family(checkpoint.config)
        config = family.read_config(checkpoint.config)
    types = _counted(checkpoint.formats().values())
    kind = find_weights(path).kind
    return {
        "kind": "GGUF file" if kind == "gguf" else f"folder of {kind}",
        "path": str(path),
        "bytes": checkpoint.num_bytes,
        "architecture": family.architecture,
        "vocab_size": config.vocab_size,
        "context": config.max_context,
        "layers": config.num_layers,
        "tensors": len(checkpoint.shapes()),
        "parameters": num_parameters(config),
        "types": types,
        "identity": checkpoint.identity,
    }


def _packed_file(path: Path) -> Findings:
    try:
        key = read_packed_file_key(path)
    except PackedFileError as error:
        raise ModelError(f"{path}: {error}") from error
    return {
        "kind": "packed weights",
        "path": str(path),
        "bytes": path.stat().st_size,
        "precision": key.precision,
        "made from": key.identity,
        "layout version": key.layout_version,
    }


def _counted(names: Any) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(names).most_common())


def damaged_files(path: Path) -> list[str]:
    """The files of a bundle whose size or sha256 is not the manifest's. Reads them all. Raises `ModelError`."""
    if not is_bundle(path):
        raise ModelError(f"{path}: only a bundle tells what its files must be")
    files = BundleCheckpoint(path).manifest.files
    try:
        return [name for name, record in files.items() if read_record(path / name) != record]
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot be read: {error.strerror}") from error
