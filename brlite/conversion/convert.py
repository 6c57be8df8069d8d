"""`brlite convert`: makes a bundle of a model, which loads without packing. Makes all checks before it writes.

The three flags are those of the manual's `model_convert.py`. The result is not a traced graph but the weights: as
safetensors, which every backend reads, and as the packed file that native kernels map (`checkpoint/bundle.py`).
The bundle is a folder named after the model, in `output_dir`. No code of the model is run. Memory holds about one
tensor.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

import brlite
from brlite.backends.choose import find_obstacle
from brlite.backends.native.library import load_library
from brlite.backends.native.packed_file_writer import Packing
from brlite.checkpoint import Checkpoint, open_checkpoint
from brlite.checkpoint.bundle import FORMAT, FORMAT_VERSION, Manifest
from brlite.checkpoint.checked_model import CheckedModel, check_model, quantized_formats
from brlite.checkpoint.folder import CONFIG_FILE, find_weights, has_weights
from brlite.checkpoint.model_file import BUNDLED_TOOL_TEMPLATE_FILE, TOOL_TEMPLATE_FILE
from brlite.checkpoint.model_name import COMPANION_FILES, check_name
from brlite.checkpoint.pooling_config import BUNDLED_POOLING_FILE, POOLING_FILE
from brlite.checkpoint.progress import byte_bar
from brlite.checkpoint.repository import FOLDER_PREFIX
from brlite.checkpoint.traced_checkpoint import TracedArchive, TracedCheckpoint
from brlite.config.manual_json import ManualConfig
from brlite.config.options import EngineConfig, ModelSpec
from brlite.conversion.bundle_writer import (
    BundlePlan,
    check_folder,
    find_finished,
    plan_packing,
    plan_weights,
    write_bundle,
)
from brlite.conversion.rounding import Rounding
from brlite.errors import ConfigError, ModelError, NativeUnavailable
from brlite.files.new_file import write_whole
from brlite.files.quoting import MAX_EXCERPT, one_line, reason
from brlite.models.families.hf_config import QUANTIZATION_KEY
from brlite.models.network import num_parameters
from brlite.models.precision import PRECISIONS, PrecisionName
from brlite.models.registry import find_family
from brlite.process.machine import show_bytes
from brlite.tokenizer import Tokenizer, load_tokenizer
from brlite.tokenizer.gguf_vocabulary import hugging_face_files

INPUT_NAME, OUTPUT_NAME = "input_ids.1", "logits"
BUILD_SEQ, BUILD_BATCH = 2048, 16  # of the config that is printed
MANUALS_MAX_SEQ = 8192
VOCABULARY_FILE = "vocabulary.gguf"  # in bundles of older versions, which made no tokenizer.json of a GGUF file
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# Files in folders of a model → their names in a bundle, which has no folders.
BUNDLED_NAMES = {POOLING_FILE: BUNDLED_POOLING_FILE, TOOL_TEMPLATE_FILE: BUNDLED_TOOL_TEMPLATE_FILE}


class ConversionRequest(NamedTuple):
    """What to convert: a model's folder, or a traced file with that folder's config and tokenizer."""

    model_name: str
    model_dir: Path
    output_dir: Path
    precision: PrecisionName
    traced: Path | None = None


def run(request: ConversionRequest) -> int:
    """Write the bundle, unless a finished one is there, and print its files. Returns 0. Raises `BrliteError`."""
    checkpoint = (
        TracedCheckpoint(request.traced, request.model_dir) if request.traced else open_checkpoint(request.model_dir)
    )
    name = model_name(request.model_name)
    model = check_model(checkpoint, ModelSpec(name=name, build_seq=1))
    if model.has_scoring_head:
        raise ModelError(f"{request.model_dir}: a bundle has no place for a scoring head; serve the folder as it is")
    packing = None  # then the bundle has no packed file, and its weights are packed at each load
    obstacle = find_obstacle(model.config, ModelSpec(precision=request.precision), EngineConfig(device="cpu"))
    if obstacle is None:
        try:
            packing = plan_packing(load_library().functions, model, PRECISIONS[request.precision])
        except NativeUnavailable as error:
            obstacle = str(error)
    plan = _plan(request, name, checkpoint, model, packing)
    for source in (request.model_dir, request.traced or request.model_dir):
        files = source.iterdir() if source.is_dir() else (source,)  # they may be links, as in the hub's cache
        if plan.folder.exists() and any(
            file.exists() and plan.folder.samefile(file.resolve().parent) for file in files
        ):
            raise ModelError(f"{plan.folder}: is what is to be converted; name another output_dir or model_name")
    check_folder(plan)
    finished = find_finished(plan)
    tokenizer = load_tokenizer(request.model_dir)
    for number, line in enumerate(_checks(request, plan, tokenizer, obstacle, finished is not None), 1):
        print(f"{number:2} {line}", flush=True)
    if finished is not None:
        print(f"\n{plan.folder} is up to date")
        _report(plan, finished)
        return 0
    began = time.monotonic()
    with byte_bar(plan.num_bytes, f"writing {plan.folder.name}") as on_bytes:
        manifest, rounding = write_bundle(plan, on_bytes)
    _report(plan, manifest, rounding, time.monotonic() - began)
    return 0


def model_name(text: str) -> str:
    """The name that requests will use. A folder name of the hub's cache, such as
    models--Qwen--Qwen2-72B, is turned into the model's name."""
    organisation, _, model = text.removeprefix(FOLDER_PREFIX).partition("--")
    name = f"{organisation}/{model}" if text.startswith(FOLDER_PREFIX) and model else text
    try:
        check_name(name)
    except ModelError as error:
        raise ConfigError(f"--model_name: {error}") from None
    return name


def read_side_files(model: Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The small files of a model that its bundle keeps, by name: config, tokenizer, chat template; never code.

    `model` is a folder or a `.gguf` file. For GGUF the config is always `config`, which was read from the GGUF file.
    Raises `ModelError` for a file that cannot be read.
    """
    files = [model / name for name in (*COMPANION_FILES, VOCABULARY_FILE)] if model.is_dir() else []
    weights = find_weights(model) if not model.is_dir() or has_weights(model) else None
    try:
        side_files = {file.name: file.read_bytes() for file in files if file.is_file() and file.parent == model}
        for name, bundled_name in BUNDLED_NAMES.items():
            for file in (model / name, model / bundled_name):
                if file.is_file():
                    side_files[bundled_name] = file.read_bytes()
        is_gguf = weights is not None and weights.kind == "gguf"
        # The bundle's weights are not quantized, and `config` does not say that they are.
        if is_gguf or QUANTIZATION_KEY.encode() in side_files.get(CONFIG_FILE, b""):
            side_files[CONFIG_FILE] = json.dumps(config, indent=1).encode()
        if weights is not None and is_gguf and not any(name in side_files for name in TOKENIZER_FILES):
            side_files = {**hugging_face_files(weights.files[0]), **side_files}
    except OSError as error:
        raise ModelError(f"{model}: cannot be read: {reason(error)}") from error
    return side_files


def manual_config(manifest: Manifest, folder: Path, max_context: int) -> ManualConfig:
    """The manual's 13 fields for a bundle. `serialize_file` is empty: the bundle has its packed weights."""
    return ManualConfig(
        model=manifest.model,
        cached_dir=str(folder),
        input_name=manifest.input_name,
        output_name=manifest.output_name,
        vocab_size=manifest.vocab_size,
        model_file=str(folder),
        serialize_file="",
        model_precision=manifest.precision,
        build_seq=min(BUILD_SEQ, max_context),
        build_batch=BUILD_BATCH,
        distribute_param=(1, 1, 1),
        devices=(0,),
        all_models={"http://host_ip:port": manifest.model},
    )


def _plan(
    request: ConversionRequest, name: str, checkpoint: Checkpoint, model: CheckedModel, packing: Packing | None
) -> BundlePlan:
    names = None if request.traced is None else TracedArchive(request.traced).graph_names()
    draft = Manifest(
        format=FORMAT,
        format_version=FORMAT_VERSION,
        brlite=brlite.__version__,
        model=name,
        architecture=find_family(checkpoint.config).architecture,
        precision=request.precision,
        num_parameters=num_parameters(model.config),
        vocab_size=model.config.vocab_size,
        input_name=names.input_name if names else INPUT_NAME,
        output_name=(names and names.output_key) or OUTPUT_NAME,
        source=checkpoint.identity,
        files={},
    )
    return BundlePlan(
        folder=(request.output_dir / name.replace("/", "--")).absolute(),
        checkpoint=checkpoint,
        model=model,
        draft=draft,
        side_files=read_side_files(request.model_dir, checkpoint.config),
        shards=plan_weights(checkpoint, model),
        packing=packing,
    )


def _checks(
    request: ConversionRequest, plan: BundlePlan, tokenizer: Tokenizer, obstacle: str | None, is_finished: bool
) -> Iterator[str]:
    """Check the model, yielding a line for each check that passes. Raises `ModelError` for one that fails."""
    source, config = plan.checkpoint.config, plan.model.config
    yield f"output       {_room(plan)}"
    if source.get("use_cache") is False:
        yield "config       use_cache is false"
    else:
        wanted = "no matter for a bundle; br-vllm-serving's own tool needs it to be false in config.json"
        yield f"config       use_cache is not false: {wanted}"
    code = "; the code that its auto_map names is not needed, and is not run" if source.get("auto_map") else ""
    yield f"architecture {plan.draft.architecture}{code}"
    version = source.get("transformers_version")
    version = f"{one_line(version, MAX_EXCERPT)} wrote the config; " if version else ""
    yield f"transformers {version}not needed: brlite has its own models"
    tied = ", the head is the embedding" if config.tie_word_embeddings else ""
    ignored = f", {len(plan.model.ignored)} are not needed" if plan.model.ignored else ""
    yield f"tensors      all {len(plan.model.targets)} are there, with the shapes that the config wants{tied}{ignored}"
    highest, rows = max((tokenizer.vocab_size - 1, *tokenizer.eos_token_ids)), config.vocab_size
    if highest >= rows:
        raise ModelError(f"{request.model_dir}: its tokenizer has token ids up to {highest}, the model {rows} rows")
    yield f"vocabulary   {rows} rows, {tokenizer.vocab_size} tokens"
    given = "" if request.model_name == plan.draft.model else f", from {request.model_name}"
    yield f"name         {plan.draft.model}{given}"
    is_int8 = PRECISIONS[plan.draft.precision].weights == "int8"
    rounding = "int8 is compared with bfloat16 while it is packed" if is_int8 else "bfloat16, no int8"
    widened = quantized_formats(plan.model.formats)
    kept = f"; {', '.join(widened)} are widened: serve the model itself to keep its size" if widened else ""
    yield f"rounding     {rounding}{kept}"
    heads = f"{config.num_heads} heads of {config.head_dim}, {config.num_kv_heads} of keys and values"
    limit = f" (br-vllm-serving allows {MANUALS_MAX_SEQ})" if config.max_context > MANUALS_MAX_SEQ else ""
    packed = "" if obstacle is None else f"; weights are not packed: {obstacle}"
    yield f"shapes       {heads}, context of {config.max_context}{limit}{packed}"
    chat = "with a chat template" if tokenizer.has_chat_template else "without a chat template: no Chat API"
    yield f"tokenizer    loads, {chat}"
    yield f"run again    {'all of it is there already' if is_finished else 'it goes on where this run has ended'}"


def _room(plan: BundlePlan) -> str:
    parent = plan.folder
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ModelError(f"{parent}: must be a folder that can be written to")
    there = sum(file.stat().st_size for file in plan.folder.iterdir()) if plan.folder.exists() else 0
    needed, free = plan.num_bytes, shutil.disk_usage(parent).free + there
    if needed > free:
        what = f"{plan.folder}: {show_bytes(needed)} are needed, but the disk has {show_bytes(free)} free"
        raise ModelError(what) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return f"{plan.folder}: {show_bytes(needed)} are needed, {show_bytes(free)} free"


def _report(
    plan: BundlePlan, manifest: Manifest, rounding: Rounding | None = None, seconds: float | None = None
) -> None:
    took = "" if seconds is None else f", in {seconds:.1f} s"
    num_bytes = sum(record.num_bytes for record in manifest.files.values())
    print(f"\nbundle      {plan.folder}: {show_bytes(num_bytes)}{took}")
    print(f"input       {manifest.input_name}")
    print(f"output      {one_line(manifest.output_name)} (a config may name any other, such as 9 or 10)")
    print(f"vocab_size  {manifest.vocab_size}")
    print(f"parameters  {manifest.num_parameters / 1e6:.4g} million, {manifest.precision}")
    if rounding is not None:
        error, cosine = f"{rounding.max_error:.2%} of a row's largest weight", f"{rounding.min_cosine:.5f}"
        print(f"rounding    int8 is off by {error} at most; the least cosine of a matrix's outputs is {cosine}")
    width = max(map(len, manifest.files))
    print(f"\n{'file':{width}} {'bytes':>14}  sha256")
    for name, record in manifest.files.items():
        print(f"{name:{width}} {record.num_bytes:>14}  {record.sha256}")
    config = manual_config(manifest, plan.folder, plan.model.config.max_context)
    text = msgspec.json.format(msgspec.json.encode(config))
    file = plan.folder.with_name(f"{plan.folder.name}.json")
    if not file.exists():
        write_whole(file, text + b"\n")
        print(f"\nA config for it, with br-vllm-serving's 13 fields, is in {file}:\n")
    else:
        print(f"\nA config for it, with br-vllm-serving's 13 fields ({file} is there already and is kept):\n")
    print(text.decode(), flush=True)
