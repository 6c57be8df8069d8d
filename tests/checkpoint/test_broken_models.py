"""Everything that can be wrong with a model on disk: one line that names the file, before any tensor is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from brlite.checkpoint import open_checkpoint
from brlite.errors import ModelError
from tests.checkpoint.model_files import (
    random_gguf_tensors,
    random_tensors,
    write_bin,
    write_config,
    write_gguf,
    write_safetensors,
    write_sharded_bin,
    write_sharded_safetensors,
)
from tests.quantized_files import MIXES, write_quantized

Break = Callable[[Path], Path]  # spoils a model in a folder; returns the path to open


class TouchesAFile:
    """Unpickled, it would create `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def cut(file: Path, num_bytes: int) -> Path:
    file.write_bytes(file.read_bytes()[:num_bytes])
    return file


def safetensors_with(folder: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (write_config(folder) / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return folder


def one_tensor(folder: Path, **changes: Any) -> Path:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes
    return safetensors_with(folder, {"w": entry}, bytes(8))


def index_with(folder: Path, content: object) -> Path:
    (write_config(folder) / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def without_shard(folder: Path) -> Path:
    (write_sharded_safetensors(folder, random_tensors()) / "model-00002-of-00003.safetensors").unlink()
    return folder


def without_index_and_shard(folder: Path) -> Path:
    (without_shard(folder) / "model.safetensors.index.json").unlink()
    return folder


def folder_with(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def without_bin_shard(folder: Path) -> Path:
    (write_sharded_bin(folder, random_tensors()) / "pytorch_model-00003-of-00003.bin").unlink()
    return folder


def truncated_safetensors(folder: Path) -> Path:
    cut(write_safetensors(folder, random_tensors()) / "model.safetensors", -5)
    return folder


def safetensors_with_a_tail(folder: Path) -> Path:
    with (write_safetensors(folder, random_tensors()) / "model.safetensors").open("ab") as stream:
        stream.write(b"tail")
    return folder


def doubled_tensor(folder: Path) -> Path:
    write_sharded_safetensors(folder, random_tensors())
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].write_bytes(shards[0].read_bytes())
    return folder


def config_with(folder: Path, content: str) -> Path:
    (write_safetensors(folder, random_tensors()) / "config.json").write_text(content)
    return folder


def without_config(folder: Path) -> Path:
    (write_safetensors(folder, random_tensors()) / "config.json").unlink()
    return folder


def truncated_bin(folder: Path) -> Path:
    cut(write_bin(folder, random_tensors()) / "pytorch_model.bin", 400)
    return folder


def bin_with(folder: Path, content: object) -> Path:
    torch.save(content, write_config(folder) / "pytorch_model.bin")
    return folder


def zip_garbage(folder: Path) -> Path:
    file = write_bin(folder, random_tensors()) / "pytorch_model.bin"
    raw = bytearray(file.read_bytes())
    raw[100:160] = bytes(range(60))  # inside the pickle
    file.write_bytes(raw)
    return folder


def zip_name_in_no_encoding(folder: Path) -> Path:
    file = write_bin(folder, random_tensors()) / "pytorch_model.bin"
    raw = bytearray(file.read_bytes())
    place = raw.index(b"PK\x01\x02")  # the first entry of the zip's list
    raw[place + 9] |= 0x08  # flag 11: its name is UTF-8
    raw[place + 46] = 0xFF
    file.write_bytes(raw)
    return folder


def garbage(folder: Path, name: str, content: bytes) -> Path:
    (write_config(folder) / name).write_bytes(content)
    return folder


def cut_gguf(folder: Path, num_bytes: int) -> Path:
    return cut(write_gguf(folder / "m.gguf"), num_bytes)


def gguf_bytes(folder: Path, content: bytes) -> Path:
    (folder / "m.gguf").write_bytes(content)
    return folder / "m.gguf"


def gguf_meta(folder: Path, **metadata: Any) -> Path:
    return write_gguf(folder / "m.gguf", metadata={"." + key.replace("__", "."): metadata[key] for key in metadata})


def gguf_extra(folder: Path, name: str, data: np.ndarray) -> Path:
    kind = GGMLQuantizationType.F32 if data.dtype == np.float32 else GGMLQuantizationType.I32
    return write_gguf(folder / "m.gguf", random_gguf_tensors() | {name: (data, kind)})


def gguf_typed(folder: Path, type_id: int) -> Path:
    """A matrix of rows of 96 numbers is said to be of another type."""
    file = write_gguf(folder / "m.gguf")
    raw = bytearray(file.read_bytes())
    name = b"blk.0.ffn_down.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8  # the number of dimensions, and two of them
    raw[at : at + 4] = struct.pack("<I", type_id)
    file.write_bytes(raw)
    return file


def gguf_without(folder: Path, name: str) -> Path:
    tensors = random_gguf_tensors()
    del tensors[name]
    return write_gguf(folder / "m.gguf", tensors)


def two_ggufs(folder: Path) -> Path:
    write_gguf(folder / "a.gguf")
    write_gguf(folder / "b.gguf")
    return folder


def split_gguf(folder: Path) -> Path:
    """The first of four parts."""
    tensors = random_gguf_tensors()
    return write_gguf(folder / "m.gguf", tensors, part_tensors=-(-len(tensors) // 4))


def without(first: Path, number: str) -> Path:
    first.with_name(first.name.replace("00001", number)).unlink()
    return first


def swapped_parts(folder: Path) -> Path:
    first = split_gguf(folder)
    second, third = (first.with_name(first.name.replace("00001", number)) for number in ("00002", "00003"))
    second.rename(folder / "kept")
    third.rename(second)
    (folder / "kept").rename(third)
    return first


def odd_part(folder: Path) -> Path:
    """The last part has a tensor that no model has."""
    tensors = {**random_gguf_tensors(), "odd.weight": random_gguf_tensors()["output_norm.weight"]}
    return write_gguf(folder / "m.gguf", tensors, part_tensors=-(-len(tensors) // 4))


def doubled_part(folder: Path) -> Path:
    """The second part has the tensors of the first one."""
    first, count = split_gguf(folder), {"split.count": 4, "split.no": 1}
    names = list(random_gguf_tensors())[:1]
    tensors = {name: random_gguf_tensors()[name] for name in names}
    write_gguf(first.with_name(first.name.replace("00001", "00002")), tensors, metadata=count)
    return first


def gguf_header(*, version: int = 3, num_tensors: int = 0, num_metadata: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_metadata) + rest


def gguf_string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


HUGE = 2**62
BROKEN: dict[str, tuple[Break, str]] = {
    "nothing there": (lambda folder: folder / "absent", "no such model folder"),
    "empty folder": (lambda folder: folder, "looked for model.safetensors"),
    "other file": (lambda folder: garbage(folder, "notes.txt", b"hello") / "notes.txt", "a folder or a .gguf file"),
    "no config": (without_config, "config.json: the file is missing"),
    "config is a list": (lambda folder: config_with(folder, "[1]"), "config.json: must hold a JSON object"),
    "config is not JSON": (lambda folder: config_with(folder, "{'a': 1}"), "config.json: not readable as JSON"),
    "config is too deep": (lambda folder: config_with(folder, "[" * 100_000), "config.json: not readable as JSON"),
    "config is not UTF-8": (lambda folder: garbage(config_with(folder, ""), "config.json", b"\xff{}"), "config.json"),
    "config is a folder": (lambda folder: (without_config(folder) / "config.json").mkdir() or folder, "config.json"),
    "missing shard": (without_shard, "1 of 3 shards are missing, the first is 'model-00002-of-00003.safetensors'"),
    "a file of the folder": (
        lambda folder: write_safetensors(folder, random_tensors()) / "model.safetensors",
        "a model must be a folder or a .gguf file; give /",
    ),
    "missing index and shard": (without_index_and_shard, "1 of 3 shards are missing"),
    "LoRA adapter": (
        lambda folder: folder_with(folder, "adapter_config.json", "adapter_model.safetensors"),
        "is a LoRA adapter, not a model: merge it into its base model",
    ),
    "hub's cache": (
        lambda folder: folder_with(folder, "refs/main", "snapshots/abc/model.safetensors"),
        "is a model's folder in a hub's cache; give its name, or a folder in its snapshots",
    ),
    "mmproj only": (lambda folder: folder_with(folder, "mmproj-f16.gguf"), "no weights: looked for"),
    "missing bin shard": (without_bin_shard, "pytorch_model-00003-of-00003.bin"),
    "index without map": (lambda folder: index_with(folder, {}), "weight_map must map"),
    "index of numbers": (
        lambda folder: index_with(folder, {"weight_map": {"w": 1}}),
        "1 of 1 shards are missing, the first is '1'",
    ),
    "index leads away": (lambda folder: index_with(folder, {"weight_map": {"w": "../w"}}), "beside the index"),
    "tensor in two shards": (doubled_tensor, "an earlier shard"),
    "safetensors: truncated": (truncated_safetensors, "bytes long by its header"),
    "safetensors: bytes left": (safetensors_with_a_tail, "bytes long by its header"),
    "safetensors: empty file": (lambda folder: garbage(folder, "model.safetensors", b""), "is empty"),
    "safetensors: a page of HTML": (
        lambda folder: garbage(folder, "model.safetensors", b"<html>Sign in to continue</html>"),
        "is a web page",
    ),
    "safetensors: header beyond the file": (
        lambda folder: garbage(folder, "model.safetensors", struct.pack("<Q", 99) + b"{}"),
        "a header of 99 bytes, a file of 10",
    ),
    "safetensors: bad JSON": (lambda folder: safetensors_with(folder, b"{'w'"), "not JSON"),
    "safetensors: deep JSON": (lambda folder: safetensors_with(folder, b"[" * 100_000), "not JSON"),
    "safetensors: header of 5 MB": (
        lambda folder: safetensors_with(folder, b" " * 5_000_000),
        "a header of 5000000 bytes (allowed: 4194304); save it in several shards",
    ),
    "safetensors: header is a list": (lambda folder: safetensors_with(folder, []), "JSON object"),
    "safetensors: entry is a number": (lambda folder: safetensors_with(folder, {"w": 1}), "must have dtype"),
    "safetensors: unknown dtype": (lambda folder: one_tensor(folder, dtype="F64"), "'F64'; allowed are F32"),
    "safetensors: whole numbers": (lambda folder: one_tensor(folder, dtype="I32"), "'I32'; allowed are F32"),
    "safetensors: negative shape": (lambda folder: one_tensor(folder, shape=[-2]), "impossible shape"),
    "safetensors: wrong offsets": (lambda folder: one_tensor(folder, data_offsets=[0, 4]), "takes 8 bytes"),
    "safetensors: gap": (lambda folder: one_tensor(folder, data_offsets=[4, 12]), "starts at byte 4"),
    "safetensors: huge shape": (lambda folder: one_tensor(folder, shape=[HUGE]), "impossible shape"),
    "bin: truncated": (truncated_bin, "truncated"),
    "bin: garbage": (lambda folder: garbage(folder, "pytorch_model.bin", b"\x80\x02}q\x00."), "is a bare pickle"),
    "bin: garbage in a zip": (zip_garbage, "torch refuses it"),
    "bin: a name in no encoding": (zip_name_in_no_encoding, "not a zip file as torch.save writes it: 'utf-8' codec"),
    "bin: a list": (lambda folder: bin_with(folder, [torch.zeros(1)]), "dict of tensors"),
    "bin: a nested dict": (lambda folder: bin_with(folder, {"model": {"w": torch.zeros(1)}}), "names to tensors"),
    "bin: whole numbers": (lambda folder: bin_with(folder, {"w": torch.zeros(1, dtype=torch.int8)}), "torch.int8"),
    "bin: sparse": (lambda folder: bin_with(folder, {"w": torch.zeros(1).to_sparse()}), "torch.sparse"),
    "gguf: empty file": (lambda folder: gguf_bytes(folder, b""), "is empty"),
    "gguf: wrong magic": (lambda folder: gguf_bytes(folder, b"GGML" + bytes(60)), "not a GGUF"),
    "gguf: magic only": (lambda folder: gguf_bytes(folder, b"GGUF"), "truncated"),
    "gguf: version 1": (lambda folder: gguf_bytes(folder, gguf_header(version=1)), "version 1"),
    "gguf: big-endian": (lambda folder: gguf_bytes(folder, gguf_header(version=3 << 24)), "version 50331648"),
    "gguf: cut in the header": (lambda folder: cut_gguf(folder, 300), "truncated"),
    "gguf: cut in the data": (lambda folder: cut_gguf(folder, -1), "ends at byte"),
    "gguf: endless metadata": (lambda folder: gguf_bytes(folder, gguf_header(num_metadata=HUGE)), "allowed: 65536"),
    "gguf: endless tensors": (lambda folder: gguf_bytes(folder, gguf_header(num_tensors=HUGE)), "allowed: 65536"),
    "gguf: endless string": (
        lambda folder: gguf_bytes(folder, gguf_header(num_metadata=1, rest=struct.pack("<Q", HUGE))),
        "truncated",
    ),
    "gguf: endless array": (
        lambda folder: gguf_bytes(
            folder, gguf_header(num_metadata=1, rest=gguf_string(b"k") + struct.pack("<IIQ", 9, 8, HUGE))
        ),
        "strings at byte",
    ),
    "gguf: array of arrays": (
        lambda folder: gguf_bytes(
            folder, gguf_header(num_metadata=1, rest=gguf_string(b"k") + struct.pack("<IIQ", 9, 9, 1))
        ),
        "array of unknown type 9",
    ),
    "gguf: not UTF-8": (
        lambda folder: gguf_bytes(folder, gguf_header(num_metadata=1, rest=gguf_string(b"\xff"))),
        "broken GGUF header",
    ),
    "gguf: unknown architecture": (lambda folder: write_gguf(folder / "m.gguf", architecture="mamba"), "'mamba'"),
    "gguf: key missing": (lambda folder: gguf_meta(folder, embedding_length=None), "llama.embedding_length"),
    "gguf: ill-typed key": (lambda folder: gguf_meta(folder, block_count="one"), "llama.block_count"),
    "gguf: experts": (lambda folder: gguf_meta(folder, expert_count=8), "llama.expert_count"),
    "gguf: part of rope": (lambda folder: gguf_meta(folder, rope__dimension_count=8), "rope.dimension_count"),
    "gguf: unknown scaling": (lambda folder: gguf_meta(folder, rope__scaling__type="longrope"), "'longrope'"),
    "gguf: unknown scaling key": (lambda folder: gguf_meta(folder, rope__scaling__alpha=2.0), "rope.scaling.alpha"),
    "gguf: no factor": (lambda folder: gguf_meta(folder, rope__scaling__type="linear"), "rope.scaling.factor"),
    "gguf: heads do not fit": (lambda folder: gguf_meta(folder, attention__head_count_kv=1), "must have 16 rows"),
    "gguf: no embedding": (lambda folder: gguf_without(folder, "token_embd.weight"), "token_embd.weight"),
    "gguf: unknown tensor": (
        lambda folder: gguf_extra(folder, "blk.0.ssm.weight", np.zeros(4, np.float32)),
        "'blk.0.ssm.weight'",
    ),
    "gguf: unknown rope": (
        lambda folder: gguf_extra(folder, "rope_freqs.weight", np.full(8, 3, np.float32)),
        "rope_freqs.weight",
    ),
    "gguf: rope of no factor but one": (
        lambda folder: gguf_extra(folder, "rope_freqs.weight", np.array([1, 0.5] * 4, np.float32)),
        "with factor 1",
    ),
    "gguf: rope of no number": (
        lambda folder: gguf_extra(folder, "rope_freqs.weight", np.array([1, np.nan] * 4, np.float32)),
        "finite divisors",
    ),
    "gguf: rope without a factor": (
        lambda folder: gguf_extra(folder, "rope_freqs.weight", np.full(8, 1e-4, np.float32)),
        "rope_scaling.factor",
    ),
    "gguf: infinite rope": (
        lambda folder: gguf_extra(folder, "rope_freqs.weight", np.full(8, np.inf, np.float32)),
        "finite divisors",
    ),
    "gguf: a key twice": (
        lambda folder: gguf_bytes(
            folder, gguf_header(num_metadata=2, rest=(gguf_string(b"a.key") + struct.pack("<IB", 7, 1)) * 2)
        ),
        "the key 'a.key' is listed twice",
    ),
    "gguf: end token is a list": (
        lambda folder: write_gguf(folder / "m.gguf", metadata={"tokenizer.ggml.eos_token_id": [1, 2]}),
        "eos_token_id",
    ),
    "gguf: quantized rows of part of a block": (
        lambda folder: gguf_typed(folder, GGMLQuantizationType.Q4_K),
        "has shape (64, 96); Q4_K needs 256s",
    ),
    "gguf: unknown type": (lambda folder: gguf_typed(folder, 99), "is of type 99, which the gguf package"),
    "gguf: cut in quantized data": (
        lambda folder: cut(write_quantized(folder / "m.gguf", MIXES["q4_k_m"]), -100),
        "truncated: tensor",
    ),
    "gguf: whole numbers": (lambda folder: gguf_extra(folder, "w.weight", np.zeros(4, np.int32)), "type I32"),
    "gguf: missing part": (
        lambda folder: without(split_gguf(folder), "00003"),
        "1 of 4 shards are missing, the first is 'm-00003-of-00004.gguf'",
    ),
    "gguf: folder without the first part": (
        lambda folder: without(split_gguf(folder), "00001").parent,
        "1 of 4 shards are missing, the first is 'm-00001-of-00004.gguf'",
    ),
    "gguf: a later part": (
        lambda folder: split_gguf(folder).with_name("m-00002-of-00004.gguf"),
        "a later part of a split GGUF; give the first one, m-00001-of-00004.gguf",
    ),
    "gguf: no part by its header": (
        lambda folder: write_gguf(folder / "m-00001-of-00001.gguf", metadata={"split.count": 2}),
        "split.no must be 0 and split.count 1 by the file's name, got 0 and 2",
    ),
    "gguf: one part, renamed": (lambda folder: split_gguf(folder).rename(folder / "m.gguf"), "got 0 and 4"),
    "gguf: parts in another order": (lambda folder: swapped_parts(folder), "split.no must be 1 and split.count 4"),
    "gguf: parts of two files": (
        lambda folder: doubled_part(folder),
        "m-00002-of-00004.gguf: tensor 'token_embd.weight' is listed twice",
    ),
    "gguf: a name in a later part": (lambda folder: odd_part(folder), "m-00004-of-00004.gguf: tensor 'odd.weight'"),
    "gguf: whole file and parts": (
        lambda folder: write_gguf(split_gguf(folder).with_name("n.gguf")).parent,
        "holds 2 .gguf files",
    ),
    "gguf: two in a folder": (two_ggufs, "holds 2 .gguf files"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    spoil, expected = BROKEN[case]
    path = spoil(tmp_path)

    with pytest.raises(ModelError) as refusal:
        open_checkpoint(path)

    message = str(refusal.value)
    assert expected in message
    assert "\n" not in message
    assert str(tmp_path) in message
    assert len(message) < 600


@pytest.mark.parametrize("inside_a_dict", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(inside_a_dict: bool, tmp_path: Path) -> None:
    marker = tmp_path / "was here"
    payload = TouchesAFile(marker)
    bin_with(tmp_path, {"w": payload} if inside_a_dict else payload)

    with pytest.raises(ModelError, match=r"pytorch_model\.bin: torch refuses it") as refusal:
        open_checkpoint(tmp_path)

    assert not marker.exists()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("position", range(0, 1200, 13))
def test_a_gguf_with_a_flipped_byte_opens_or_is_refused(position: int, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf", metadata={"tokenizer.ggml.tokens": ["a", "b"]})
    raw = bytearray(file.read_bytes())
    raw[position] ^= 0xFF
    file.write_bytes(raw)

    try:
        outcome = open_checkpoint(file).path
    except ModelError as error:
        outcome = str(error)

    assert str(file) in str(outcome)
