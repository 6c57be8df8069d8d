"""Bundles: the same bits as what they were made of, whole or not there, finished by the next run."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from brlite.backends.choose import load_backend
from brlite.backends.native.backend import NativeBackend
from brlite.backends.native.library import NativeLibrary
from brlite.backends.native.packed_file import read_packed_file_key
from brlite.backends.native.packer import load_weights
from brlite.backends.sizes import sizes_at
from brlite.backends.torch.loading import load_model
from brlite.checkpoint import Checkpoint, open_checkpoint
from brlite.checkpoint.bundle import (
    MANIFEST_FILE,
    PROGRESS_FILE,
    BundleCheckpoint,
    packed_name,
    read_manifest,
    read_progress,
)
from brlite.checkpoint.checked_model import check_model
from brlite.config.options import EngineConfig, ModelSpec
from brlite.conversion.bundle_writer import find_finished, write_bundle
from brlite.errors import ModelError
from brlite.files.new_file import read_record
from brlite.models.precision import PRECISIONS, PrecisionName
from tests.backends.native_models import MODELS, random_ids
from tests.bundles import INT8, make_bundle, plan_bundle
from tests.limits import PATIENCE_SECONDS
from tests.load_plans import make_plan
from tests.tiny_models import TINY_CONFIGS, TensorCheckpoint, random_tensors, write_tiny_model

ROOT = Path(__file__).parents[2]
PROMPT = random_ids(20, seed=3)


@pytest.fixture
def library(native_library: NativeLibrary) -> ctypes.CDLL:
    return native_library.functions


def write_unrounded(folder: Path, config: dict[str, object]) -> Path:
    """A model whose numbers need all the digits of float32, so that rounding them twice would show."""
    folder.mkdir()
    (folder / "config.json").write_bytes(msgspec.json.encode(config))
    random = torch.Generator().manual_seed(5)
    tensors = {
        name: tensor * (1 + 0.01 * torch.rand(tensor.shape, generator=random))
        for name, tensor in random_tensors(config).items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def native_logits(
    native: NativeLibrary, path: Path, precision: PrecisionName, image: Path | None
) -> npt.NDArray[np.float32]:
    checkpoint = open_checkpoint(path)
    spec = ModelSpec(name="tiny", precision=precision, build_seq=len(PROMPT), build_batch=1, num_blocks=4)
    engine = EngineConfig(threads=1, max_num_batched_tokens=32)
    backend = NativeBackend(native, make_plan(checkpoint, spec, engine, packed_file=image))
    with closing(backend):
        return backend.logits(PROMPT)


def torch_parameters(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path)
    spec = ModelSpec(name="tiny", precision="bf16", build_seq=8)
    return load_model(make_plan(checkpoint, spec), torch.bfloat16, torch.device("cpu")).parameters.named


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", TINY_CONFIGS)
def test_a_bundle_has_the_bits_of_its_source(name: str, tmp_path: Path, native_library: NativeLibrary) -> None:
    source, bundle = write_unrounded(tmp_path / "source", TINY_CONFIGS[name]), tmp_path / "bundle"

    make_bundle(source, bundle, native_library.functions)

    image = bundle / packed_name(PRECISIONS[INT8])
    expected = native_logits(native_library, source, INT8, None)
    assert np.array_equal(native_logits(native_library, bundle, INT8, image), expected)
    assert np.array_equal(native_logits(native_library, bundle, INT8, None), expected)
    assert np.array_equal(
        native_logits(native_library, bundle, "bf16", None), native_logits(native_library, source, "bf16", None)
    )
    plain, bundled = torch_parameters(source), torch_parameters(bundle)
    assert all(torch.equal(bundled[parameter], tensor) for parameter, tensor in plain.items())


@pytest.mark.parametrize("precision", ["bf16", "a_bf16_w_int8"])
@pytest.mark.parametrize("name", MODELS)
def test_its_image_is_byte_for_byte_the_one_that_loading_would_write(
    name: str, precision: PrecisionName, tmp_path: Path, library: ctypes.CDLL
) -> None:
    source = write_unrounded(tmp_path / "source", MODELS[name])
    make_bundle(source, tmp_path / "bundle", library, precision)

    checkpoint = open_checkpoint(tmp_path / "bundle")
    spec = ModelSpec(name="tiny", precision=precision, build_seq=8)
    written = tmp_path / "written"
    load_weights(library, make_plan(checkpoint, spec, packed_file=written)).close()

    image = tmp_path / "bundle" / packed_name(PRECISIONS[precision])
    assert image.read_bytes() == written.read_bytes()


def test_its_shards_are_what_other_programs_read(tmp_path: Path, library: ctypes.CDLL) -> None:
    source = write_tiny_model(tmp_path / "source")

    manifest = make_bundle(source, tmp_path / "bundle", library)

    expected = load_file(source / "model.safetensors")
    index = msgspec.json.decode((tmp_path / "bundle" / "model.safetensors.index.json").read_bytes())
    assert len(set(index["weight_map"].values())) > 3
    found = {name: load_file(tmp_path / "bundle" / file)[name] for name, file in index["weight_map"].items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].float(), tensor) for name, tensor in expected.items())
    assert {tensor.dtype for name, tensor in found.items() if tensor.ndim == 2} == {torch.bfloat16}
    assert all(read_record(tmp_path / "bundle" / name) == record for name, record in manifest.files.items())


def test_a_bundle_stays_itself_when_it_is_copied(tmp_path: Path, library: ctypes.CDLL) -> None:
    make_bundle(write_tiny_model(tmp_path / "source"), tmp_path / "bundle", library)

    copy = Path(shutil.copytree(tmp_path / "bundle", tmp_path / "copy", copy_function=shutil.copyfile))

    image = copy / packed_name(PRECISIONS[INT8])
    checkpoint = open_checkpoint(copy)
    assert checkpoint.identity == read_packed_file_key(image).identity


def test_a_damaged_image_is_made_anew_from_the_shards(tmp_path: Path, native_library: NativeLibrary) -> None:
    make_bundle(write_tiny_model(tmp_path / "source"), tmp_path / "bundle", native_library.functions)
    image = tmp_path / "bundle" / packed_name(PRECISIONS[INT8])
    whole = image.read_bytes()
    image.write_bytes(whole[:-100] + bytes(100))

    found = native_logits(native_library, tmp_path / "bundle", INT8, image)

    assert np.array_equal(found, native_logits(native_library, tmp_path / "source", INT8, None))
    assert image.read_bytes() == whole


def test_without_native_kernels_a_bundle_has_no_image(tmp_path: Path) -> None:
    make_bundle(write_tiny_model(tmp_path / "source"), tmp_path / "bundle", None)

    assert not (tmp_path / "bundle" / packed_name(PRECISIONS[INT8])).exists()
    checkpoint = open_checkpoint(tmp_path / "bundle")
    assert checkpoint.shapes().keys() == TensorCheckpoint.tiny().shapes().keys()


def test_another_precision_adds_to_a_bundle(tmp_path: Path, library: ctypes.CDLL) -> None:
    source, bundle = write_tiny_model(tmp_path / "source"), tmp_path / "bundle"
    make_bundle(source, bundle, library, INT8)
    before = {file.name: file.stat().st_ino for file in bundle.glob("model-*")}

    manifest = make_bundle(source, bundle, library, "bf16")

    assert (bundle / packed_name(PRECISIONS[INT8])).is_file()
    assert (bundle / packed_name(PRECISIONS["bf16"])).is_file()
    assert {"packed.bf16.brlite", "packed.a_bf16_w_int8.brlite"} <= manifest.files.keys()
    assert {file.name: file.stat().st_ino for file in bundle.glob("model-*")} == before


KILLED = """
import os, signal, sys
from pathlib import Path
from brlite.backends.native.library import load_library
from tests.bundles import make_bundle

left = int(sys.argv[3])
def on_bytes(num_bytes):
    global left
    left -= num_bytes
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

make_bundle(Path(sys.argv[1]), Path(sys.argv[2]), load_library().functions, on_bytes=on_bytes)
"""


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_a_killed_run_leaves_no_bundle_and_the_next_one_goes_on(
    share: float, tmp_path: Path, library: ctypes.CDLL
) -> None:
    source, bundle, expected = write_tiny_model(tmp_path / "source"), tmp_path / "bundle", tmp_path / "expected"
    make_bundle(source, expected, library)
    num_bytes = sum(len(content) for name, content in contents(expected).items() if name.startswith("model-"))
    arguments = [sys.executable, "-c", KILLED, str(source), str(bundle), str(int(share * num_bytes))]

    killed = subprocess.run(arguments, cwd=ROOT, timeout=PATIENCE_SECONDS)

    assert killed.returncode == -signal.SIGKILL
    finished = {name: (bundle / name).stat().st_ino for name in whole_files(bundle)}
    assert (len(finished) > 0) == (share > 0)
    assert not (bundle / MANIFEST_FILE).exists()
    with pytest.raises(ModelError, match="not finished; run the same `brlite convert` again"):
        open_checkpoint(bundle)

    make_bundle(source, bundle, library)

    assert contents(bundle) == contents(expected)
    assert {name: (bundle / name).stat().st_ino for name in finished} == finished


def whole_files(bundle: Path) -> list[str]:
    """What the unfinished bundle says it has; all of it is as it says."""
    progress = read_progress(bundle)
    assert progress is not None
    assert all(read_record(bundle / name) == record for name, record in progress.files.items())
    return list(progress.files)


class FailingCheckpoint(TensorCheckpoint):
    """A checkpoint whose file breaks half way."""

    def tensors(self):
        for count, tensor in enumerate(super().tensors()):
            if count == 15:
                raise ModelError("tiny: cut short")
            yield tensor


def open_failing(path: Path) -> Checkpoint:
    checkpoint = FailingCheckpoint.tiny()
    checkpoint.path = path
    return checkpoint


def test_a_source_that_breaks_leaves_finished_shards_and_nothing_else(tmp_path: Path, library: ctypes.CDLL) -> None:
    checkpoint = open_failing(write_tiny_model(tmp_path / "source"))

    with pytest.raises(ModelError, match="tiny: cut short"):
        write_bundle(plan_bundle(checkpoint, tmp_path / "bundle", library), lambda num_bytes: None)

    assert {file.name for file in (tmp_path / "bundle").iterdir()} == {
        PROGRESS_FILE,
        *whole_files(tmp_path / "bundle"),
    }


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_refused(number: float, tmp_path: Path, library: ctypes.CDLL) -> None:
    tensors = random_tensors(TINY_CONFIGS["llama"])
    tensors["lm_head.weight"][7, 3] = number
    source = write_tiny_model(tmp_path / "source")
    save_file(tensors, source / "model.safetensors")

    with pytest.raises(ModelError, match=r"source: lm_head.weight has a number that is not finite"):
        make_bundle(source, tmp_path / "bundle", library)

    assert not (tmp_path / "bundle" / MANIFEST_FILE).exists()


def test_an_interrupt_removes_what_is_not_finished(tmp_path: Path, library: ctypes.CDLL) -> None:
    left = [3]

    def interrupt(num_bytes: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_bundle(write_tiny_model(tmp_path / "source"), tmp_path / "bundle", library, on_bytes=interrupt)

    assert [file.name for file in (tmp_path / "bundle").glob("*.part")] == []
    assert not (tmp_path / "bundle" / MANIFEST_FILE).exists()


def test_a_shard_that_was_changed_since_is_written_again(tmp_path: Path, library: ctypes.CDLL) -> None:
    source, bundle = write_tiny_model(tmp_path / "source"), tmp_path / "bundle"
    make_bundle(source, bundle, library)
    expected = contents(bundle)
    shard = sorted(bundle.glob("model-*"))[1]
    shard.write_bytes(expected[shard.name][:-1] + bytes([expected[shard.name][-1] ^ 1]))
    (bundle / MANIFEST_FILE).rename(bundle / PROGRESS_FILE)

    make_bundle(source, bundle, library)

    assert contents(bundle) == expected


def test_a_changed_source_is_converted_anew_and_old_shards_are_removed(tmp_path: Path, library: ctypes.CDLL) -> None:
    source, bundle, expected = tmp_path / "source", tmp_path / "bundle", tmp_path / "expected"
    make_bundle(write_tiny_model(source, "llama-biases"), bundle, library)
    make_bundle(write_tiny_model(source, "llama-tied", seed=7), expected, library)

    make_bundle(source, bundle, library)

    assert contents(bundle) == contents(expected)


def test_a_killed_conversion_of_a_changed_source_is_finished_by_the_next_run(
    tmp_path: Path, library: ctypes.CDLL
) -> None:
    source, bundle, expected = tmp_path / "source", tmp_path / "bundle", tmp_path / "expected"
    make_bundle(write_tiny_model(source, "llama-biases"), bundle, library)
    make_bundle(write_tiny_model(source, "llama-tied", seed=7), expected, library)

    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), str(bundle), "0"], cwd=ROOT, timeout=PATIENCE_SECONDS
    )

    assert killed.returncode == -signal.SIGKILL
    assert whole_files(bundle) == []
    make_bundle(source, bundle, library)
    assert contents(bundle) == contents(expected)


def test_a_finished_bundle_is_found_only_for_its_source_and_precision(tmp_path: Path, library: ctypes.CDLL) -> None:
    source, bundle = write_tiny_model(tmp_path / "source"), tmp_path / "bundle"
    manifest = make_bundle(source, bundle, library)

    def find(**draft: str) -> object:
        checkpoint = open_checkpoint(source)
        return find_finished(plan_bundle(checkpoint, bundle, library, **draft))

    assert find() == manifest
    assert find(precision="bf16") is None
    assert find(model="other") is None
    (source / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert find() is None
    (source / "generation_config.json").unlink()
    os.truncate(bundle / "config.json", 3)
    assert find() is None


def test_two_conversions_do_not_write_to_one_folder(tmp_path: Path, library: ctypes.CDLL) -> None:
    source, bundle = write_tiny_model(tmp_path / "source"), tmp_path / "bundle"
    refusals: list[str] = []

    def convert_too(num_bytes: int) -> None:
        if not refusals:
            with pytest.raises(ModelError) as refusal:
                make_bundle(source, bundle, library)
            refusals.append(str(refusal.value))

    make_bundle(source, bundle, library, on_bytes=convert_too)

    assert refusals == [f"{bundle}: another conversion is writing there"]


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda bundle: os.truncate(sorted(bundle.glob("model-*"))[0], 99), ["model-00001", "99 bytes", "manifest"]),
        (lambda bundle: sorted(bundle.glob("model-*"))[0].unlink(), ["model-00001", "No such file"]),
        (lambda bundle: (bundle / MANIFEST_FILE).write_text('{"format": '), [MANIFEST_FILE, "not the manifest"]),
        (lambda bundle: (bundle / MANIFEST_FILE).write_text("[]"), [MANIFEST_FILE, "not the manifest"]),
        (lambda bundle: (bundle / MANIFEST_FILE).write_bytes(b"\xff"), [MANIFEST_FILE, "not UTF-8"]),
        (lambda bundle: replace(bundle, '"format_version": 1', '"format_version": 2'), ["version 2", "version 1"]),
        (lambda bundle: replace(bundle, "model-00001", "../model-00001"), ["../model-00001", "beside it"]),
        (lambda bundle: replace(bundle, '"num_bytes": ', '"num_bytes": -'), ["not the manifest", ">= 0"]),
        (lambda bundle: replace(bundle, '"sha256": "', '"sha256": "\\u001b[2J'), ["not the manifest", "sha256"]),
        (lambda bundle: (bundle / MANIFEST_FILE).rename(bundle / PROGRESS_FILE), ["not finished"]),
        (lambda bundle: (bundle / "config.json").write_text("{"), ["config.json", "JSON"]),
        (lambda bundle: (bundle / "config.json").unlink(), ["config.json"]),
    ],
)
def test_a_broken_bundle_is_refused_in_one_line(tmp_path: Path, break_it, words: list[str]) -> None:
    bundle = tmp_path / "bundle"
    make_bundle(write_tiny_model(tmp_path / "source"), bundle, None)
    break_it(bundle)

    with pytest.raises(ModelError) as refusal:
        open_checkpoint(bundle)

    assert all(word in str(refusal.value) for word in [str(bundle), *words])
    assert "\n" not in str(refusal.value)


def replace(bundle: Path, old: str, new: str) -> None:
    manifest = bundle / MANIFEST_FILE
    manifest.write_text(manifest.read_text().replace(old, new))


def test_a_bundle_says_what_it_is(tmp_path: Path, library: ctypes.CDLL) -> None:
    manifest = make_bundle(write_tiny_model(tmp_path / "source"), tmp_path / "bundle", library)

    assert read_manifest(tmp_path / "bundle") == manifest
    checkpoint = BundleCheckpoint(tmp_path / "bundle")
    assert checkpoint.manifest == manifest


def test_auto_is_the_precision_that_a_bundle_was_last_made_for(tmp_path: Path, native_library: NativeLibrary) -> None:
    source, bundle = write_unrounded(tmp_path / "source", TINY_CONFIGS["llama"]), tmp_path / "bundle"
    engine = EngineConfig(device="cpu", threads=1, max_num_batched_tokens=32)
    spec = ModelSpec(name="tiny", path=str(bundle), build_seq=len(PROMPT), build_batch=1, num_blocks=4)
    for made_for in (INT8, "bf16", INT8):
        make_bundle(source, bundle, native_library.functions, made_for)
        checkpoint = open_checkpoint(bundle)

        sizes = sizes_at(bundle, spec, engine)
        with closing(load_backend(checkpoint, check_model(checkpoint, spec), spec, engine)) as backend:
            logits = backend.logits(PROMPT)

        assert backend.info.precision == made_for
        assert np.array_equal(logits, native_logits(native_library, source, made_for, None))
        said = f"{made_for}, which the bundle was made for (auto)" if made_for == INT8 else "bf16, as no matrix"
        assert sizes.precision.startswith(said)
        assert sizes.kv_dtype == ("int8" if made_for.endswith("kv_int8") else "bfloat16")
    assert {"packed.bf16.brlite", "packed.a_bf16_w_int8.brlite"} <= {file.name for file in bundle.iterdir()}
