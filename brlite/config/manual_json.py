"""Reads the manual's JSON config, exactly its 13 fields with their types, and converts it into a `Config`.

`cached_dir` is optional. Keys of `all_models` are not checked, since the manual's own examples have placeholders there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import msgspec

from brlite.config.options import Config, Count, DeviceIndex, Text
from brlite.config.validation import convert, make_config, show
from brlite.errors import ConfigError
from brlite.files.cache import expand_home
from brlite.files.text_file import unique_fields
from brlite.models.precision import PrecisionName


class ManualConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The 13 fields, in the manual's order. `distribute_param` is [TP, PP, DP]."""

    model: Text
    cached_dir: str = ""
    input_name: str
    output_name: str
    vocab_size: Count
    model_file: str
    serialize_file: str
    model_precision: PrecisionName
    build_seq: Count
    build_batch: Count
    distribute_param: tuple[Count, Count, Count]
    devices: tuple[DeviceIndex, ...]
    all_models: dict[str, str]


def load_manual_config(text: str, path: Path) -> Config:
    """Read the manual's JSON. `text` is the content of the file `path`.

    Raises a one-line `ConfigError` naming file, field, value and what is allowed.
    """
    try:
        data = json.loads(text, object_pairs_hook=unique_fields, parse_constant=_refuse_constant)
        json.dumps(data, ensure_ascii=False).encode()  # a lone surrogate must fail here, not when it is printed
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid JSON: nested too deeply") from None
    manual = convert(data, ManualConfig, source=str(path))
    for contradiction in _contradictions(manual):
        raise ConfigError(f"{path}: {contradiction}")
    try:
        weights_path = _weights_path(manual)
    except OSError as error:
        raise ConfigError(f"{path}: model_file = {show(manual.model_file)}: {error.strerror}") from None
    model = {
        "name": manual.model,
        "path": weights_path,
        "precision": manual.model_precision,
        "build_seq": manual.build_seq,
        "build_batch": manual.build_batch,
        "tensor_parallel": manual.distribute_param[0],
        "devices": manual.devices,
        "vocab_size": manual.vocab_size,
        "model_file": manual.model_file,
        "serialize_file": manual.serialize_file,
        "input_name": manual.input_name,
        "output_name": manual.output_name,
    }
    return make_config({"model": [model], "proxy": {"all_models": manual.all_models}}, source=str(path))


def _weights_path(manual: ManualConfig) -> str | None:
    """The model's path: `model_file` if it is a folder or a GGUF file, else `cached_dir`. None if there is only a name.

    A traced `.pt` has no config and no tokenizer: they are read from the folder, and the weights from the `.pt`.
    """
    file = expand_home(manual.model_file)
    if manual.model_file and (file.suffix == ".gguf" or file.is_dir()):
        return manual.model_file
    if manual.cached_dir:
        return manual.cached_dir
    has_folder = file.suffix == ".pt" and (file.parent / "config.json").is_file()
    return str(file.parent) if has_folder else None


def _contradictions(manual: ManualConfig) -> Iterator[str]:
    tensor_parallel, pipeline_parallel, data_parallel = manual.distribute_param
    at = f"distribute_param = {show(manual.distribute_param)}"
    if pipeline_parallel != 1:
        yield f"{at}: allowed as PP is 1; to use more cards raise TP"
    if data_parallel != 1:
        yield f"{at}: allowed as DP is 1; for replicas start one server for each, behind `brlite proxy`"
    if len(set(manual.devices)) < len(manual.devices):
        yield f"devices = {show(manual.devices)}: allowed is each device once"
    if tensor_parallel != len(manual.devices):
        yield f"{at}: allowed as TP is the number of devices, here {len(manual.devices)}"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
