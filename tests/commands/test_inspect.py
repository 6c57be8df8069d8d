"""`brlite inspect` says what a file or folder holds, of each kind; and that it is none of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from brlite.backends.native.library import NativeLibrary
from brlite.checkpoint.bundle import MANIFEST_FILE, packed_name
from brlite.commands.cli import main
from brlite.models.precision import PRECISIONS
from tests.bundles import INT8, make_bundle
from tests.checkpoint.model_files import write_gguf
from tests.quantized_folders import awq, write_folder
from tests.tiny_models import TINY_CONFIGS, VOCAB_SIZE, tiny_tensors, write_tiny_model
from tests.traced_models import write_traced


@pytest.fixture
def bundle(tmp_path: Path, native_library: NativeLibrary) -> Path:
    make_bundle(write_tiny_model(tmp_path / "source"), tmp_path / "bundle", native_library.functions)
    return tmp_path / "bundle"


def inspect(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["inspect", str(path), "--json"]) == 0
    findings: dict[str, Any] = json.loads(capsys.readouterr().out)
    return findings


def num_parameters(name: str) -> int:
    return sum(tensor.numel() for tensor in tiny_tensors(name).values())


@pytest.mark.parametrize("name", ["llama", "chatglm"])
def test_a_traced_file_tells_the_names_that_the_manuals_config_asks_for(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_traced(tmp_path / "tiny.pt", tiny_tensors(name))

    found = inspect(file, capsys)

    assert found["kind"] == "traced .pt"
    assert (found["input_name"], found["output's key"]) == ("input_ids.1", "logits")
    assert found["vocab_size"] == VOCAB_SIZE
    assert found["parameters"] == num_parameters(name)
    assert found["types"] == f"{len(tiny_tensors(name))} F32"


def test_a_folder_tells_its_architecture_and_types(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(write_tiny_model(tmp_path / "source", "qwen2"), capsys)

    assert found["kind"] == "folder of safetensors"
    assert found["architecture"] == "Qwen2ForCausalLM"
    assert found["parameters"] == num_parameters("qwen2")
    assert found["types"] == f"{len(tiny_tensors('qwen2'))} F32"


def test_a_quantized_folder_tells_its_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "model", awq())

    found = inspect(tmp_path / "model", capsys)

    assert found["tensors"] == 21
    assert found["types"] == "14 AWQ 4-bit with zero points, 7 F16"


def test_a_gguf_file_tells_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(write_gguf(tmp_path / "tiny.gguf"), capsys)

    assert found["kind"] == "GGUF file"
    assert found["vocab_size"] == 40
    assert found["types"] == "12 F32"


def test_a_bundle_tells_its_manifest(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(bundle, capsys)

    assert found["kind"] == "bundle"
    assert found["precision"] == INT8
    assert found["parameters"] == num_parameters("llama")
    assert {*found["files"], MANIFEST_FILE} == {file.name for file in bundle.iterdir()}


def test_packed_weights_tell_of_what_they_are(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = bundle / packed_name(PRECISIONS[INT8])

    found = inspect(image, capsys)

    assert found["kind"] == "packed weights"
    assert found["precision"] == "a_bf16_w_int8"
    assert found["made from"] == inspect(bundle, capsys)["identity"]


def test_a_damaged_file_of_a_bundle_is_found_by_its_hash(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = main(["inspect", str(bundle), "--verify"])
    shard = sorted(bundle.glob("model-*"))[2]
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")

    after = main(["inspect", str(bundle), "--verify"])

    assert (before, after) == (0, 1)
    assert f"damaged files  {shard.name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such model folder or file"),
        (b"", "a model must be a folder or a .gguf file"),
        (b"PK\x03\x04 but no zip", "not a traced .pt file"),
        (b"brlite\x00\x01 but no image", "its manifest is damaged"),
    ],
)
def test_what_is_none_of_them_is_one_line(
    content: bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.bin"
    if content is not None:
        file.write_bytes(content)

    assert main(["inspect", str(file)]) == 2
    assert words in capsys.readouterr().err


def test_only_a_bundle_can_be_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tiny_model(tmp_path / "source")

    assert main(["inspect", str(source), "--verify"]) == 2
    assert "only a bundle tells what its files must be" in capsys.readouterr().err
    assert json.loads((source / "config.json").read_text()) == TINY_CONFIGS["llama"]
