"""Packed weights and their image: what is packed is what int8 makes of it, and a file is used only if it is whole."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from brlite.backends.native import abi
from brlite.backends.native.library import load_library
from brlite.backends.native.memory import NativeMemory
from brlite.backends.native.packed_file import (
    MappedPackedFile,
    PackedFileError,
    PackedFileKey,
    checksums,
    packed_file_header,
    write_packed_file,
)
from brlite.backends.native.packer import PackedWeights, load_weights
from brlite.backends.torch.quantize import dequantize_weight, quantize_weight
from brlite.checkpoint import open_checkpoint
from brlite.config.options import ModelSpec
from brlite.files.ownership import why_untrusted
from brlite.models.precision import PrecisionName
from tests.load_plans import make_plan
from tests.tiny_models import write_tiny_model

KEY = PackedFileKey(layout_version=1, precision="bf16", identity="abc", num_bytes=3 * 2**20 + 5)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return load_library().functions


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def memory(library: ctypes.CDLL) -> Iterator[NativeMemory]:
    with closing(NativeMemory(library, KEY.num_bytes, "a test")) as memory:
        memory.bytes()[:] = np.random.default_rng(0).integers(0, 256, KEY.num_bytes, np.uint8)
        yield memory


@pytest.fixture
def image(tmp_path: Path, library: ctypes.CDLL, memory: NativeMemory, pool: ThreadPoolExecutor) -> Path:
    path = tmp_path / "folder" / "weights.brlite"
    write_packed_file(path, KEY, memory, checksums(library, memory.address, memory.num_bytes, pool))
    return path


def open_image(
    path: Path, library: ctypes.CDLL, pool: ThreadPoolExecutor, key: PackedFileKey = KEY
) -> MappedPackedFile:
    return MappedPackedFile(path, key, library, pool, lambda fraction: None)


def test_an_image_gives_back_the_bytes_it_was_made_of(
    image: Path, library: ctypes.CDLL, memory: NativeMemory, pool: ThreadPoolExecutor
) -> None:
    with closing(open_image(image, library, pool)) as mapped:
        found = ctypes.string_at(mapped.address, mapped.num_bytes)

    assert found == memory.bytes().tobytes()
    assert os.listdir(image.parent) == [image.name]


def test_an_image_is_mapped_by_a_kernel_whose_pages_have_64_kib(
    image: Path, library: ctypes.CDLL, memory: NativeMemory, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = mmap.mmap

    def mapped(file: int, length: int, *, access: int, offset: int = 0) -> mmap.mmap:
        if offset % 2**16:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(file, length, access=access, offset=offset)

    monkeypatch.setattr(mmap, "mmap", mapped)
    with closing(open_image(image, library, pool)) as found:
        assert ctypes.string_at(found.address, found.num_bytes) == memory.bytes().tobytes()


def test_an_image_is_trusted_with_any_umask(
    tmp_path: Path, library: ctypes.CDLL, memory: NativeMemory, pool: ThreadPoolExecutor
) -> None:
    path, sums = tmp_path / "folder" / "weights.brlite", checksums(library, memory.address, memory.num_bytes, pool)
    umask = os.umask(0)
    try:
        write_packed_file(path, KEY, memory, sums)
    finally:
        os.umask(umask)

    assert why_untrusted(path) is None


def test_a_changed_byte_anywhere_is_noticed(image: Path, library: ctypes.CDLL, pool: ThreadPoolExecutor) -> None:
    whole = image.read_bytes()
    for place in (12, 200, 4096, len(whole) // 2, len(whole) - 1):
        image.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])

        with pytest.raises(PackedFileError) as refusal:
            open_image(image, library, pool)

        assert refusal.value.is_ours


def test_a_file_cut_short_is_noticed(image: Path, library: ctypes.CDLL, pool: ThreadPoolExecutor) -> None:
    whole = image.read_bytes()
    for length in (20, 4096, len(whole) - 1):
        image.write_bytes(whole[:length])

        with pytest.raises(PackedFileError):
            open_image(image, library, pool)


def test_an_image_of_other_weights_is_not_used(image: Path, library: ctypes.CDLL, pool: ThreadPoolExecutor) -> None:
    for key in (
        PackedFileKey(2, "bf16", "abc", KEY.num_bytes),
        PackedFileKey(1, "a_bf16_w_int8", "abc", KEY.num_bytes),
        PackedFileKey(1, "bf16", "other", KEY.num_bytes),
        PackedFileKey(1, "bf16", "abc", KEY.num_bytes + 1),
    ):
        with pytest.raises(PackedFileError, match=r"its .* is .*, not "):
            open_image(image, library, pool, key)


def test_what_a_file_says_of_itself_is_cut_and_escaped(
    tmp_path: Path, library: ctypes.CDLL, pool: ThreadPoolExecutor
) -> None:
    path = tmp_path / "packed.brlite"
    path.write_bytes(packed_file_header(PackedFileKey(1, "bf16", "\x1b" * 9000, 5), []))

    with pytest.raises(PackedFileError, match=r"its identity is [\\x1b]{10,80}\.*, not abc$"):
        open_image(path, library, pool, PackedFileKey(1, "bf16", "abc", 5))


def load(folder: Path, library: ctypes.CDLL, precision: PrecisionName, image: Path | None = None) -> PackedWeights:
    spec = ModelSpec(name="tiny", precision=precision, build_seq=32)
    checkpoint = open_checkpoint(folder)
    return load_weights(library, make_plan(checkpoint, spec, packed_file=image, num_threads=2))


def test_a_second_load_maps_the_image_of_the_first(tmp_path: Path, library: ctypes.CDLL) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama")
    image = tmp_path / "packed.brlite"

    first = load(folder, library, "a_bf16_w_int8", image)
    made = image.stat().st_mtime_ns
    second = load(folder, library, "a_bf16_w_int8_kv_int8", image)

    assert image.stat().st_mtime_ns == made
    assert first.content_hash == second.content_hash
    first.close()
    second.close()


def test_an_image_of_older_weights_is_made_anew(tmp_path: Path, library: ctypes.CDLL) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama")
    image = tmp_path / "packed.brlite"
    load(folder, library, "bf16", image).close()
    old = image.read_bytes()
    os.utime(next(folder.glob("*.safetensors")), ns=(1, 1))

    load(folder, library, "bf16", image).close()

    assert image.read_bytes()[4096:] == old[4096:]
    assert image.read_bytes() != old


def test_a_file_that_is_not_ours_is_left_alone(
    tmp_path: Path, library: ctypes.CDLL, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama")
    image = tmp_path / "thesis.bin"
    image.write_bytes(b"years of work")

    load(folder, library, "bf16", image).close()

    assert image.read_bytes() == b"years of work"
    assert "it is not a packed file of brlite" in caplog.text


def test_a_folder_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, library: ctypes.CDLL, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama")
    (tmp_path / "file").write_text("")

    load(folder, library, "bf16", tmp_path / "file" / "packed.brlite").close()

    assert "is not used: cannot be read: Not a directory" in caplog.text


@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(16, 32), (17, 33), (5, 576), (48, 70)])
def test_packed_int8_is_what_the_torch_pass_makes_of_a_matrix(
    library: ctypes.CDLL, num_outputs: int, num_inputs: int
) -> None:
    weight = np.random.default_rng(1).standard_normal((num_outputs, num_inputs)).astype(np.float32)
    weight[0] = 0
    weight[1] *= 1e-30
    weight[2] *= 1e20
    expected = dequantize_weight(quantize_weight(torch.from_numpy(weight).bfloat16())).numpy()

    assert np.array_equal(pack_and_unpack(library, abi.INT8, weight), expected)


@pytest.mark.parametrize("lost", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_makes_its_group_not_finite(library: ctypes.CDLL, lost: float) -> None:
    weight = np.ones((2, 64), np.float32)
    weight[1, 3] = lost

    found = pack_and_unpack(library, abi.INT8, weight)

    assert not np.isfinite(found[1, :32]).any()
    assert np.allclose(found[1, 32:], 1, rtol=0.01)
    assert np.allclose(found[0], 1, rtol=0.01)


def test_packed_bfloat16_is_the_nearest_number(library: ctypes.CDLL) -> None:
    weight = np.random.default_rng(2).standard_normal((33, 47)).astype(np.float32)

    found = pack_and_unpack(library, abi.BF16, weight)

    assert np.array_equal(found, torch.from_numpy(weight).bfloat16().float().numpy())


def pack_and_unpack(library: ctypes.CDLL, number_format: int, weight: np.ndarray) -> np.ndarray:
    num_outputs, num_inputs = weight.shape
    panels = np.zeros(library.brlite_packed_bytes(number_format, num_outputs, num_inputs), np.uint8)
    library.brlite_pack(number_format, weight.ctypes.data, 0, num_outputs, num_inputs, panels.ctypes.data)
    out = np.empty_like(weight)
    for row in range(num_outputs):
        library.brlite_unpack_row(number_format, panels.ctypes.data, row, num_inputs, out[row].ctypes.data)
    return out
