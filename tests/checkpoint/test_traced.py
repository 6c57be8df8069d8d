"""Traced `.pt` files are read as data: their weights, their names, and nothing that would have to be run."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.traced_checkpoint import TracedArchive, TracedCheckpoint
from brlite.checkpoint.traced_code import GraphNames, class_text, graph_names
from brlite.checkpoint.traced_pickle import read_pickle
from brlite.errors import ModelError
from tests.load_plans import read_tensors
from tests.tiny_models import TINY_CONFIGS, tiny_tensors
from tests.traced_models import Returns, loaded_input_name, write_traced

FILE = Path("tiny.pt")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder without weights."""
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIGS["llama"]))
    return tmp_path


@pytest.fixture
def traced(folder: Path) -> Path:
    return write_traced(folder / "tiny.pt", tiny_tensors("llama"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "baichuan", "chatglm"])
def test_every_parameter_is_read_and_no_buffer(name: str, dtype: torch.dtype, folder: Path) -> None:
    tensors = tiny_tensors(name)
    file = write_traced(folder / "tiny.pt", tensors, dtype=dtype)

    checkpoint = TracedCheckpoint(file, folder)
    shapes, found = checkpoint.shapes(), read_tensors(checkpoint)

    assert found.keys() == shapes.keys() == tensors.keys()
    assert list(found) == list(shapes)
    for name, values in found.items():
        assert values.flags.writeable
        assert values.flags.c_contiguous
        assert np.array_equal(values, tensors[name].to(dtype).float().numpy())


def test_a_transposed_tensor_is_refused_by_name(folder: Path) -> None:
    tensors = tiny_tensors("llama")
    tensors["lm_head.weight"] = torch.randn(64, 300).t()

    with pytest.raises(ModelError, match=r"'lm_head.weight' of shape .* has strides .1, 300., but its rows"):
        TracedCheckpoint(write_traced(folder / "tiny.pt", tensors), folder)


def test_a_folder_without_weights_takes_them_from_the_traced_file(folder: Path, traced: Path) -> None:
    checkpoint = open_checkpoint(folder, str(traced))
    assert checkpoint.path == traced

    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"model.safetensors: is empty"):
        open_checkpoint(folder, str(traced))


def test_the_identity_changes_with_the_file_and_with_the_config(folder: Path, traced: Path) -> None:
    first = TracedCheckpoint(traced, folder).identity
    os.utime(traced, (1, 1))
    second = TracedCheckpoint(traced, folder).identity
    (folder / "config.json").write_text(json.dumps(TINY_CONFIGS["llama"] | {"rope_theta": 7}))

    assert len({first, second, TracedCheckpoint(traced, folder).identity}) == 3


@pytest.mark.parametrize(("returns", "key"), [("dict", "logits"), ("tuple", None), ("tensor", None)])
def test_names_are_those_that_torchscript_gives(returns: Returns, key: str | None, tmp_path: Path) -> None:
    file = write_traced(tmp_path / "tiny.pt", tiny_tensors("llama"), returns)

    assert TracedArchive(file).graph_names() == GraphNames(loaded_input_name(file), key)


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ("x = torch.mul(input_ids, 2)\n    return {'logits': torch.to(x, 6)}", "logits"),
        ("x = {'logits': input_ids}\n    return x", "logits"),
        (f"x = input_ids{'.a' * 2000}\n    return x", None),
        ("return {}", None),
        ("pass", None),
    ],
)
def test_only_a_key_that_stands_in_the_text_is_told(body: str, key: str | None) -> None:
    text = f"class A(Module):\n  def forward(self: A,\n    input_ids: Tensor) -> Tensor:\n    {body}\n"

    assert graph_names(text) == GraphNames("input_ids.1", key)


@pytest.mark.parametrize("text", ["", "class A(Module):\n  pass\n", "def forward(", "(" * 5000, "\x00", "x = 1\n"])
def test_text_without_a_graph_has_no_names(text: str) -> None:
    assert graph_names(text) is None


def test_the_text_of_a_class_ends_where_the_next_one_begins() -> None:
    source = "x = 1\nclass A(Module):\n  pass\n\n  y = 2\n\nclass B(Module):\n  pass\n"

    assert class_text(source, "__torch__.A") == "class A(Module):\n  pass\n\n  y = 2\n\n"
    assert class_text(source, "__torch__.B") == "class B(Module):\n  pass\n"
    assert class_text(source, "__torch__.C") == ""


class Executed:
    """What an evil pickle would hold: a call."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("false",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Executed(), "operation STACK_GLOBAL"),
        (collections.Counter, "operation STACK_GLOBAL"),
        ({"a": {1, 2}}, "operation EMPTY_SET"),
        ([1, 2], "must hold a traced module, got 'list'"),
    ],
)
def test_a_pickle_that_is_more_than_data_is_refused(content: object, words: str, traced: Path) -> None:
    rewrite(traced, "data.pkl", pickle.dumps(content))

    with pytest.raises(ModelError, match=words):
        TracedArchive(traced)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80\x02cos\nsystem\n(X\x05\x00\x00\x00falsetR.", "calls 'os system'"),
        (b"\x80\x02cos\nsystem\n)\x81.", "makes an object of"),
        (b"\x80\x02c__torch__ A\nB\n)\x81", "data.pkl is cut short|broken"),
        (b"\x80\x02}(X\x01\x00\x00\x00aK\x01ub.", "data.pkl is broken|builds"),
        (b"\x80\x02Q.", "data.pkl is broken"),
        (b"\x80\x02)" + b"\x85" * 100_000 + b"Q.", "refers to"),
        (b"\x80\x02h\x05.", "data.pkl is broken"),
        (b"\x80\x02X\xff\xff\xff\x7fabc", "data.pkl is broken"),
        (b"", "data.pkl is cut short|broken"),
    ],
)
def test_a_broken_pickle_is_one_line(data: bytes, words: str) -> None:
    with pytest.raises(ModelError, match=words) as refusal:
        read_pickle(data, FILE)

    assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return TracedArchive(write_traced(tmp_path_factory.mktemp("traced") / "tiny.pt", tiny_tensors("llama-tied"))).pickle


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_no_damage_to_a_pickle_gives_more_than_one_line(pickled: bytes, data: st.DataObject) -> None:
    damaged = bytearray(pickled[: data.draw(st.integers(0, len(pickled)))])
    for place, value in data.draw(
        st.dictionaries(st.integers(0, len(pickled)), st.integers(0, 255), max_size=5)
    ).items():
        if place < len(damaged):
            damaged[place] = value

    said = []
    try:
        read_pickle(bytes(damaged), FILE)
    except ModelError as error:
        said.append(str(error))

    assert not any("\n" in line for line in said)


def rewrite(file: Path, member: str, content: bytes | None, compression: int = zipfile.ZIP_STORED) -> None:
    """Replace one member of an archive, or leave it out."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    prefix = next(iter(members)).partition("/")[0]
    members[f"{prefix}/{member}"] = content if content is not None else b""
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            if content is not None or name != f"{prefix}/{member}":
                archive.writestr(name, data)


def save_plain(file: Path) -> None:
    torch.save(tiny_tensors("llama"), file)


def compress(file: Path) -> None:
    with zipfile.ZipFile(file) as archive:
        name = next(info.filename for info in archive.infolist() if "/data/" in info.filename)
        content = archive.read(name)
    rewrite(file, name.partition("/")[2], content, zipfile.ZIP_DEFLATED)


def remove_code(file: Path) -> None:
    archive = TracedArchive(file)
    type_name = archive.module.state["model"].type_name
    rewrite(file, f"code/{type_name.rpartition('.')[0].replace('.', '/')}.py", None)


def rename_in_no_encoding(file: Path) -> None:
    """A name that says it is UTF-8 and is not, in the zip's list."""
    raw = bytearray(file.read_bytes())
    place = raw.index(b"PK\x01\x02")
    raw[place + 9] |= 0x08  # flag 11: UTF-8
    raw[place + 46] = 0xFF
    file.write_bytes(raw)


def endless(file: Path) -> None:
    out = io.BytesIO()
    out.write(b"\x80\x02c__torch__\nA\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.")
    assert [operation.name for operation, _, _ in pickletools.genops(out.getvalue())][-1] == "STOP"
    rewrite(file, "data.pkl", out.getvalue())


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda file: file.write_bytes(b"no zip"), "not a traced .pt file, or cut short"),
        (lambda file: file.unlink(), "the file is missing"),
        (lambda file: os.truncate(file, file.stat().st_size // 2), "not a traced .pt file, or cut short"),
        (rename_in_no_encoding, "not a traced .pt file, or cut short: 'utf-8' codec"),
        (save_plain, "torch.save wrote it; a traced .pt is written by torch.jit.save"),
        (lambda file: rewrite(file, "data.pkl", None), "it has no data.pkl"),
        (lambda file: rewrite(file, "data/2", None), "the numbers of storage '2' are missing"),
        (lambda file: rewrite(file, "data/2", b"1234"), "storage '2' must have 76800 plain bytes"),
        (compress, "is compressed, as torch never does"),
        (lambda file: rewrite(file, "byteorder", b"big"), "big-endian"),
        (remove_code, "has no 'code/"),
        (endless, "nested without end"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(
    folder: Path, traced: Path, break_it: Callable[[Path], object], words: str
) -> None:
    break_it(traced)

    with pytest.raises(ModelError, match=words) as refusal:
        TracedCheckpoint(traced, folder)

    assert str(traced) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_weights_of_another_type_are_refused_by_name(folder: Path) -> None:
    file = write_traced(folder / "tiny.pt", tiny_tensors("llama"), dtype=torch.float64)

    with pytest.raises(
        ModelError, match=r"'model.embed_tokens.weight' is of torch DoubleStorage; allowed are F32, F16 and BF16"
    ):
        TracedCheckpoint(file, folder)
