"""Which backend computes, where torch or the native kernels are missing."""

from __future__ import annotations

import re
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from brlite.backends.choose import find_obstacle, use_one_torch_thread
from brlite.backends.plugins.contract import with_static_context
from brlite.backends.sizes import sizes_at
from brlite.backends.torch import device
from brlite.checkpoint import open_checkpoint
from brlite.commands.cli import main
from brlite.config.options import Config, EngineConfig, ModelSpec
from brlite.errors import ConfigError, MissingExtra, NativeUnavailable
from brlite.llm import build_engine
from brlite.models.precision import NATIVE_ONLY
from brlite.models.registry import find_family
from tests.tiny_models import LLAMA, write_byte_tokenizer, write_model

INSTALL_TORCH = "pip install 'brlite[torch]'"


@pytest.fixture(autouse=True)
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed."""
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "tiny", LLAMA)
    write_byte_tokenizer(folder)
    (tmp_path / "prompts.txt").write_text("abc\n")
    return folder


def generate(model: Path, *options: str) -> int:
    """Complete one prompt with `brlite generate`."""
    source = model.parent / "prompts.txt"
    return main(["generate", "--model", str(model), "--input", str(source), "--max-tokens", "2", *options])


def test_native_kernels_need_no_torch(model, native_library, capsys):
    assert generate(model) == 0

    assert '"finish_reason"' in capsys.readouterr().out


def test_torch_has_its_threads_again_after_the_last_native_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [8]
    torch = SimpleNamespace(get_num_threads=lambda: numbers[-1], set_num_threads=numbers.append)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.delitem(sys.modules, "brlite.backends.torch.backend", raising=False)
    first, second = ExitStack(), ExitStack()
    use_one_torch_thread(first)
    use_one_torch_thread(second)

    first.close()
    assert numbers == [8, 1]

    second.close()
    assert numbers == [8, 1, 8]


@pytest.mark.parametrize("size", ["vocab_size", "hidden_size", "intermediate_size", "num_heads"])
def test_native_kernels_compute_no_matrix_whose_sizes_int32_cannot_hold(size: str) -> None:
    config = find_family(LLAMA).read_config(LLAMA)
    large = msgspec.structs.replace(config, **{size: 2**31 - 4})

    assert find_obstacle(config, ModelSpec(), EngineConfig(device="cpu")) is None
    assert "in a matrix" in (find_obstacle(large, ModelSpec(), EngineConfig(device="cpu")) or "")


def test_without_a_compiler_and_torch_one_line_names_both_remedies(model, monkeypatch, capsys):
    def fail() -> None:
        raise NativeUnavailable("no C++ compiler was found; install one")

    monkeypatch.setattr("brlite.backends.native.library.load_library", fail)

    assert generate(model) == 2

    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("brlite: error: no C++ compiler was found; install one; ")
    assert line.endswith(f"needs torch, which is not installed: {INSTALL_TORCH}")


@pytest.mark.parametrize("options", [["--engine", "torch"], ["--device", "cuda"]])
def test_what_only_torch_computes_names_the_extra(model, capsys, options):
    assert generate(model, *options) == 2

    line = capsys.readouterr().err.splitlines()[-1]
    assert line.endswith(INSTALL_TORCH)


def test_a_bin_file_names_the_extra(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    sys.modules.pop("brlite.checkpoint.bin_checkpoint", None)

    with pytest.raises(MissingExtra, match=r"\.bin files needs torch, .*brlite\[torch\]"):
        open_checkpoint(model)


def test_a_card_that_torch_alone_could_use_is_told_of(tmp_path, monkeypatch, caplog):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(device, "NODES", tmp_path)
    device._warn_once.cache_clear()

    assert device.computes_on_cpu("auto")

    assert "the CPU computes, although there may be a card" in caplog.text


def test_the_absent_package_is_told_from_one_that_does_not_load():
    absent = MissingExtra("this", "torch", ModuleNotFoundError("No module named 'torch'", name="torch"))
    broken = MissingExtra("this", "torch", OSError("libgomp.so.1:\n not found"))

    assert str(absent) == f"this needs torch, which is not installed: {INSTALL_TORCH}"
    assert str(broken) == f"this needs torch, which cannot be imported (libgomp.so.1: not found): {INSTALL_TORCH}"


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        (EngineConfig(backend="torch"), 'engine.backend is "torch"'),
        (EngineConfig(dtype="float32"), 'native kernels compute in bfloat16, and engine.dtype is "float32"'),
    ],
)
@pytest.mark.parametrize("precision", sorted(NATIVE_ONLY))
def test_what_only_native_kernels_have_is_refused_where_torch_would_compute(model, engine, reason, precision):
    spec = ModelSpec(name="tiny", path=str(model), precision=precision, build_seq=64)
    line = re.escape(f"precision {precision} needs native kernels, but {reason}")

    with pytest.raises(ConfigError, match=f"^{line}$"):
        build_engine(Config(model=[spec], engine=engine))
    with pytest.raises(ConfigError, match=f"^{line}$"):
        sizes_at(model, spec, engine)


def test_rounding_to_four_bits_is_refused_with_ranks(model):
    spec = ModelSpec(name="tiny", path=str(model), precision="a_bf16_w_int4", build_seq=64, tensor_parallel=2)

    with pytest.raises(ConfigError, match=r"^tensor_parallel is 2; precision a_bf16_w_int4 allows one rank only$"):
        build_engine(Config(model=[spec]))


@pytest.mark.parametrize("precision", sorted(NATIVE_ONLY))
def test_what_only_native_kernels_have_is_refused_for_an_engine_plugin(precision):
    with pytest.raises(ConfigError, match=f"{precision} is of native kernels only; an engine plugin may have"):
        with_static_context(ModelSpec(precision=precision))
