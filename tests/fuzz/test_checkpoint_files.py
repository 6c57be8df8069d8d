"""Fuzz targets of the readers of model files: whatever the bytes are, a file opens or is refused in one line.

Each starts from a file that is whole and spoils it. Seconds long in CI; `BRLITE_FUZZ_SECONDS=600` by hand for as many
seconds a target.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import strategies as st

from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.checked_model import check_model
from brlite.checkpoint.safetensors import DTYPE_BYTES
from brlite.checkpoint.traced_checkpoint import TracedArchive
from brlite.config.options import ModelSpec
from brlite.errors import BrliteError
from brlite.tokenizer.sentencepiece_file import read_sentencepiece_file
from tests.checkpoint.model_files import write_gguf
from tests.fuzz import budget
from tests.quantized_files import MIXES, write_quantized
from tests.quantized_folders import CASES, DTYPES, write_folder
from tests.tiny_models import tiny_tensors, write_tiny_model
from tests.tokenizer.sentencepiece_models import charsmap, model, piece
from tests.traced_models import write_traced

HEADER_BYTES = 6000  # most faults lie there

# What a part of the file becomes: where, how many bytes are taken out, and what is put in their place.
splices = st.lists(
    st.tuples(
        st.one_of(st.integers(0, HEADER_BYTES), st.integers(0, 2**20)),
        st.integers(0, 16),
        st.one_of(
            st.binary(max_size=16), st.sampled_from([b"\xff" * 8, bytes(8), b"[" * 64, b"9" * 5000, b'"', b"\x1b["])
        ),
    ),
    min_size=1,
    max_size=4,
)


def spoiled(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for place, taken, given_bytes in changes:
        start = place % (len(data) + 1)
        data = data[:start] + given_bytes + data[start + taken :]
    return data


def open_model(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    check_model(checkpoint, ModelSpec(name="m", build_seq=1))
    for tensor in checkpoint.tensors():
        tensor.float32()
        if tensor.format.decode is not None:
            tensor.coded()
        if tensor.format.are_finite is not None:
            tensor.blocks()


def open_traced(path: Path) -> None:
    TracedArchive(path).parameters()


def open_pieces(path: Path) -> None:
    read_sentencepiece_file(path)


def check(path: Path, data: bytes, read: Callable[[Path], None], opened: Path) -> None:
    path.write_bytes(data)
    try:
        read(opened)
    except BrliteError as error:
        line = str(error)
        assert line.isprintable()
        assert len(line) < 1000


def fuzz(whole: Path, read: Callable[[Path], None], opened: Path) -> None:
    """Try spoiled forms of the file `whole`; `opened` is the path that is read."""
    data = whole.read_bytes()

    @budget.fuzz(splices)
    def run(changes: list[tuple[int, int, bytes]]) -> None:
        check(whole, spoiled(data, changes), read, opened)

    run()


timeout = pytest.mark.timeout(300 + 2 * budget.SECONDS)


@timeout
def test_safetensors() -> None:
    with TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder) / "m", "llama")
        fuzz(model / "model.safetensors", open_model, model)


LAYOUTS = ("gptq-act-order", "awq", "compressed-4-zeros", "int8", "fp8-block")
SHAPES: list[list[int]] = [[], [0], [0, 0], [1], [2], [1, 1], [256, 256], [32, 256], [256, 1], [4, 8, 2]]
ODD_VALUES = [0, -1, 1, 3, 2**31, 2**63, 10**30, 0.5, float("inf"), float("nan"), "", "0x0", None, True, [], [0, 0], {}]
# Which tensor gets another type or shape, which key of the config another value, or where the file ends or is spoilt.
faults = st.one_of(
    st.tuples(
        st.just("header"),
        st.tuples(st.integers(0, 100), st.sampled_from([None, *DTYPES.values()]), st.sampled_from([None, *SHAPES])),
    ),
    st.tuples(st.just("config"), st.tuples(st.integers(0, 100), st.sampled_from(ODD_VALUES))),
    st.tuples(st.just("end"), st.integers(0, 2**20)),
    st.tuples(st.just("bytes"), splices),
)


def with_header(data: bytes, tensor: int, dtype: str | None, shape: list[int] | None) -> bytes:
    """A safetensors file in which one tensor has another type or shape, and as many bytes as these take."""
    begin = 8 + int.from_bytes(data[:8], "little")
    header, content = json.loads(data[8:begin]), b""
    changed = sorted(header)[tensor % len(header)]
    for name, entry in header.items():
        stored = data[begin:][slice(*entry["data_offsets"])]
        if name == changed:
            entry.update({"dtype": dtype or entry["dtype"], "shape": entry["shape"] if shape is None else shape})
            stored = (stored + bytes(2**20))[: math.prod(entry["shape"]) * DTYPE_BYTES[entry["dtype"]]]
        entry["data_offsets"] = [len(content), len(content) + len(stored)]
        content += stored
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + content


def with_value(text: bytes, index: int, value: object) -> bytes:
    """A config in which one value of its quantization is another."""
    config = json.loads(text)
    places, todo = [], [config["quantization_config"]]
    for section in todo:
        places += [(section, key) for key in section]
        todo += [below for below in section.values() if isinstance(below, dict)]
    section, key = places[index % len(places)]
    section[key] = value
    return json.dumps(config).encode()


@timeout
def test_quantized_folders() -> None:
    with TemporaryDirectory() as folder:
        models = {name: Path(folder) / name for name in LAYOUTS}
        for name, model in models.items():
            write_folder(model, CASES[name])
        whole = {name: (model / "model.safetensors").read_bytes() for name, model in models.items()}
        configs = {name: (model / "config.json").read_bytes() for name, model in models.items()}

        @budget.fuzz(st.tuples(st.sampled_from(LAYOUTS), faults))
        def run(case: tuple[str, tuple[str, Any]]) -> None:
            name, (kind, fault) = case
            data, config = whole[name], configs[name]
            if kind == "header":
                data = with_header(data, *fault)
            elif kind == "config":
                config = with_value(config, *fault)
            elif kind == "end":
                data = data[: fault % len(data)]
            else:
                data = spoiled(data, fault)
            (models[name] / "config.json").write_bytes(config)
            check(models[name] / "model.safetensors", data, open_model, models[name])

        run()


@timeout
def test_config_json() -> None:
    with TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder) / "m", "llama")
        fuzz(model / "config.json", open_model, model)


@timeout
def test_gguf() -> None:
    with TemporaryDirectory() as folder:
        lists = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1, 1]}
        file = write_gguf(Path(folder) / "m.gguf", metadata=lists)
        fuzz(file, open_model, file)


@timeout
def test_quantized_gguf() -> None:
    with TemporaryDirectory() as folder:
        file = write_quantized(Path(folder) / "m.gguf", MIXES["q4_k_m"])
        fuzz(file, open_model, file)


@timeout
def test_traced() -> None:
    with TemporaryDirectory() as folder:
        file = write_traced(Path(folder) / "tiny.pt", tiny_tensors("llama"))
        fuzz(file, open_traced, file)


@timeout
def test_tokenizer_model() -> None:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.model"
        file.write_bytes(model([piece("b")], charsmap=charsmap({b"a": b"b"})))
        fuzz(file, open_pieces, file)
