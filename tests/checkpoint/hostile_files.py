"""Writes small files of models that were made to cost a reader more memory or time than their size allows.

One fault a file. `python -m tests.checkpoint.hostile_files FOLDER` writes them all; the tests write each when they need
it.
"""

from __future__ import annotations

import json
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from tests.checkpoint.model_files import random_gguf_tensors, write_gguf
from tests.tiny_models import write_tiny_model

TENSOR_CALL = b"ctorch._utils\n_rebuild_tensor_v2\n"
TENSOR = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00))tR"
CLASS = b'class M(Module):\n  __parameters__ = ["w", ]\n'


def safetensors(folder: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return folder


def entry(shape: list[int], end: int = 8) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}


def gguf(folder: Path, metadata: list[tuple[str, bytes]], num_tensors: int = 0, tensors: bytes = b"") -> Path:
    folder.mkdir(exist_ok=True)
    pairs = b"".join(struct.pack("<Q", len(key)) + key.encode() + value for key, value in metadata)
    head = b"GGUF" + struct.pack("<IQQ", 3, num_tensors, len(metadata))
    (folder / "m.gguf").write_bytes(head + pairs + tensors)
    return folder / "m.gguf"


def gguf_array(type_id: int, count: int, data: bytes) -> bytes:
    return struct.pack("<IIQ", 9, type_id, count) + data


def sparse_gguf(folder: Path, value: bytes, num_bytes: int) -> Path:
    """A file whose only key has this value, of as many bytes. What follows the value's head is zeros."""
    file = gguf(folder, [("k", value)])
    with file.open("r+b") as stream:
        stream.truncate(num_bytes)
    return file


def long_rope(folder: Path) -> Path:
    """A model whose frequencies are divided by eight million numbers."""
    folder.mkdir(exist_ok=True)
    rope = {"rope_freqs.weight": (np.full(2**23, 2, np.float32), GGMLQuantizationType.F32)}
    return write_gguf(folder / "m.gguf", random_gguf_tensors() | rope)


def traced(folder: Path, pickled: bytes, *, compression: int = zipfile.ZIP_STORED, code: bytes = b"") -> Path:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "m.pt", "w") as archive:
        archive.writestr("m/data.pkl", pickled, compression)
        archive.writestr("m/constants.pkl", b"\x80\x02).")
        archive.writestr("m/code/__torch__.py", code, zipfile.ZIP_DEFLATED)
    return folder / "m.pt"


def doubled(times: int) -> bytes:
    """A pickle's operations that leave a tuple of twice itself, nested so many times."""
    return b")q\x00" + b"h\x00\x86q\x00" * times


def module(state: bytes) -> bytes:
    """A pickle's operations that make a module: `state` are those of its names and values."""
    return b"c__torch__\nM\n)\x81}(" + state + b"ub"


def text(content: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(content)) + content


def long_name(folder: Path) -> Path:
    """A module with a long name, and 4000 times the same one in it."""
    names = b"".join(text(b"%d" % number) + b"h\x01" for number in range(4000))
    inner = module(text(b"w") + b"c__torch__\nM\n)\x81q\x01" + names)
    return traced(folder, b"\x80\x02" + module(text(b"x" * 2**20) + inner) + b".")


def one_class(folder: Path, code: bytes, tensor: bytes = TENSOR) -> Path:
    """A module with a tensor, and the source text of its class."""
    return traced(folder, b"\x80\x02" + module(text(b"w") + TENSOR_CALL + tensor) + b".", code=code)


def many_classes(folder: Path, num_classes: int, num_members: int) -> Path:
    """A module of modules, each of a class of its own with a tensor. The last one's source file is missing."""
    parts = [
        b"X\x05\x00\x00\x00%05dc__torch__%b\nC%d\n)\x81}X\x01\x00\x00\x00w%bsb"
        % (number, b".gone" * (number == num_classes - 1), number, TENSOR_CALL + TENSOR)
        for number in range(num_classes)
    ]
    file = traced(folder, b"\x80\x02c__torch__\nM\n)\x81}(" + b"".join(parts) + b"ub.")
    with zipfile.ZipFile(file, "a") as archive:
        for number in range(num_members):
            archive.writestr(f"m/{number}", b"")
    return file


def config(folder: Path, **changes: object) -> Path:
    write_tiny_model(folder, "llama")
    file = folder / "config.json"
    text = json.dumps({**json.loads(file.read_text()), **{name: f"@{name}@" for name in changes}})
    for name, value in changes.items():
        text = text.replace(f'"@{name}@"', value if isinstance(value, str) else json.dumps(value))
    file.write_text(text)
    return folder


def shard_index(folder: Path, content: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    return folder


def bundle(folder: Path, file_name: str) -> Path:
    """A bundle whose manifest lists one file."""
    names = ("brlite", "model", "architecture", "input_name", "output_name", "source")
    manifest = {"format": "brlite bundle", "format_version": 1, "precision": "bf16", **dict.fromkeys(names, "")}
    manifest |= {"num_parameters": 1, "vocab_size": 1, "files": {file_name: {"num_bytes": 1, "sha256": ""}}}
    folder.mkdir(exist_ok=True)
    (folder / "brlite-manifest.json").write_text(json.dumps(manifest))
    return folder


def unexpected_name(folder: Path) -> Path:
    """A tiny model with one more tensor, whose name would clear a terminal."""
    file = write_tiny_model(folder, "llama") / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    header["\x1b[2J\x1b]0;owned\x07" + "x" * 10_000] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :] + bytes(4))
    return folder


DIGITS = 4_200
HOSTILE: dict[str, Callable[[Path], Path]] = {
    "safetensors: a dimension of 4,200 digits": lambda at: safetensors(at, {"w": entry([10**DIGITS - 1])}, bytes(8)),
    "safetensors: 200,000 dimensions": lambda at: safetensors(at, {"w": entry([10**15] * 200_000)}, bytes(8)),
    "safetensors: offsets of 4,200 digits": lambda at: safetensors(at, {"w": entry([2], 10**DIGITS - 1)}, bytes(8)),
    "safetensors: a name of control characters": unexpected_name,
    "safetensors: a name of a million letters": lambda at: safetensors(at, {"w" * 10**6: 1}),
    "safetensors: 4 MB of empty lists": lambda at: safetensors(at, b'{"w":[' + b"[]," * 1_398_000 + b"[]]}"),
    "safetensors: 4 MB of short names": lambda at: safetensors(
        at, b"{" + b",".join(b'"%x":1' % number for number in range(400_000)) + b"}"
    ),
    "safetensors: 12 MB of empty lists": lambda at: safetensors(at, b'{"w":[' + b"[]," * 4_000_000 + b"[]]}"),
    "safetensors: lists in lists": lambda at: safetensors(at, b'{"w":' + b"[" * 500 + b"]" * 500 + b"}"),
    "index: a shard name of 100,000 letters": lambda at: shard_index(at, {"weight_map": {"w": "x" * 100_000}}),
    "index: a name with a zero byte": lambda at: shard_index(at, {"weight_map": {"w": "a\0b"}}),
    "index: 100,000 shards": lambda at: shard_index(at, {"weight_map": {str(i): f"s{i}" for i in range(100_000)}}),
    "bundle: a file whose name clears a terminal": lambda at: bundle(at, "\x1b[2J.safetensors"),
    "bundle: a file with a name of 100,000 letters": lambda at: bundle(at, "x" * 100_000 + ".safetensors"),
    "config: rope_theta of 400 digits": lambda at: config(at, rope_theta="1" + "0" * 399),
    "config: rope_theta of 5,000 digits": lambda at: config(at, rope_theta="1" * 5_000),
    "config: a factor of 1e308": lambda at: config(
        at, rope_scaling={"rope_type": "yarn", "factor": 1e308, "original_max_position_embeddings": 64}
    ),
    "config: a factor of 1e308, dynamic": lambda at: config(at, rope_scaling={"rope_type": "dynamic", "factor": 1e308}),
    "config: 2,000,000,000 layers": lambda at: config(at, num_hidden_layers=2 * 10**9),
    "config: a key of rope_parameters that clears a terminal": lambda at: config(
        at, rope_parameters={"\x1b[2J" + "x" * 10**6: {}}
    ),
    "config: an infinite eps": lambda at: config(at, rms_norm_eps="1e999"),
    "config: a deep value": lambda at: config(at, architectures=[[[["x" * 10**6]]]]),
    "config: a group of matrices whose name clears a terminal": lambda at: config(
        at,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"\x1b[2J\n" + "x" * 10**6: {"weights": {"num_bits": 3, "strategy": "group"}}},
        },
    ),
    "gguf: 8 MiB of bytes": lambda at: gguf(at, [("k", gguf_array(0, 2**23, bytes(2**23)))]),
    "gguf: 8 MiB of truth values": lambda at: gguf(at, [("k", gguf_array(7, 2**23, bytes(2**23)))]),
    "gguf: 8 MiB of 32-bit numbers": lambda at: gguf(at, [("k", gguf_array(4, 2**21, bytes(2**23)))]),
    "gguf: 8 MiB of token types and no tokens": lambda at: gguf(
        at, [("tokenizer.ggml.token_type", gguf_array(0, 2**23, bytes(2**23)))]
    ),
    "gguf: an array of 2**62 bytes": lambda at: gguf(at, [("k", gguf_array(0, 2**62, b""))]),
    "gguf: an architecture of a million letters": lambda at: gguf(
        at, [("general.architecture", struct.pack("<IQ", 8, 10**6) + b"\x1b" * 10**6)]
    ),
    "gguf: an alignment of 2**63": lambda at: gguf(at, [("general.alignment", struct.pack("<IQ", 10, 2**63))]),
    "gguf: 1,500,000 keys": lambda at: gguf(
        at, [(f"{number:x}", struct.pack("<IB", 0, 1)) for number in range(1_500_000)]
    ),
    "gguf: 128 MiB of empty strings": lambda at: sparse_gguf(at, gguf_array(8, 2**24, b""), 129 * 2**20),
    "gguf: a text of 128 MiB": lambda at: sparse_gguf(at, struct.pack("<IQ", 8, 2**27), 129 * 2**20),
    "gguf: 32 MiB of rotary frequencies": long_rope,
    "traced: a nested tuple in a refusal": lambda at: traced(at, b"\x80\x02" + doubled(60) + b"Q."),
    "traced: a nested tuple that is called": lambda at: traced(at, b"\x80\x02" + doubled(60) + b")R."),
    "traced: a nested tuple as a key": lambda at: traced(at, b"\x80\x02}" + doubled(60) + b"Ns."),
    "traced: nested tuples as keys": lambda at: traced(at, b"\x80\x02}(" + doubled(60) + b"Nu."),
    "traced: a compressed run of operations": lambda at: traced(
        at, b"\x80\x02" + b"}" * 2**24 + b".", compression=zipfile.ZIP_DEFLATED
    ),
    "traced: a run of operations": lambda at: traced(at, b"\x80\x02" + b"}" * 5_000_000 + b"."),
    "traced: 2,000 classes and 10,000 members": lambda at: many_classes(at, 2000, 10_000),
    "traced: a long name of a module": long_name,
    "traced: 16 MiB of empty lines in a class": lambda at: one_class(at, CLASS + b"\n" * 2**24),
    "traced: 16 MiB of names of parameters": lambda at: one_class(
        at, CLASS[:-4] + b'"' + b'", "'.join(b"%x" % number for number in range(2 * 10**6)) + b'", ]\n'
    ),
    "traced: a type of numbers that clears a terminal": lambda at: one_class(
        at, CLASS, TENSOR.replace(b"FloatStorage", b"\x1b[2J" + b"x" * 10**6)
    ),
    "traced: a tensor of nothing but a shape": lambda at: traced(at, b"\x80\x02" + TENSOR_CALL + doubled(60) + b"R."),
}


def main() -> None:
    for number, write in enumerate(HOSTILE.values()):
        write(Path(sys.argv[1]) / f"{number:02d}")


if __name__ == "__main__":
    main()
