"""`brlite tune`: advice by arithmetic."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from brlite.backends.sizes import Sizes
from brlite.commands.cli import main
from brlite.commands.tune import Advice, advise, choose
from brlite.config.load import load_config
from brlite.config.options import EngineConfig, ModelSpec
from brlite.errors import ConfigError
from brlite.process.machine import Memory
from tests.tiny_models import write_byte_tokenizer, write_tiny_model

GIB = 2**30


def sizes(weight_bytes: int, kv_bytes_per_token: int) -> Sizes:
    return Sizes(
        num_parameters=1,
        max_context=32_768,
        context=32_768,
        context_reason="",
        dtype="bfloat16",
        precision="bf16",
        weight_bytes=weight_bytes,
        kv_dtype="bfloat16",
        kv_bytes_per_token=kv_bytes_per_token,
        num_blocks=1,
        block_size=16,
    )


def test_what_is_advised_fits() -> None:
    row = advise("bf16", sizes(14 * GIB, 2**17), 24 * GIB)

    assert row.batch * row.context * row.kv_bytes_per_token + row.weight_bytes <= 24 * GIB
    assert row.context >= 8192
    assert row.batch == 8


def test_a_model_beyond_the_memory_is_not_advised() -> None:
    row = advise("bf16", sizes(14 * GIB, 2**17), 8 * GIB)

    assert row.context == 0
    assert choose([row]) is None


def test_the_most_exact_precision_that_gives_as_much_is_advised() -> None:
    exact, coarse, coarsest = Advice("a", 4, 1, 8192, 8), Advice("b", 2, 1, 8192, 16), Advice("c", 2, 1, 8192, 16)

    assert choose([exact, coarse, coarsest]) is coarse
    assert choose([exact]) is exact


def test_rounding_to_four_bits_is_advised_only_where_nothing_else_fits() -> None:
    def rows(room: int) -> list[Advice]:
        small, large = sizes(4 * GIB, 2**17), sizes(7 * GIB, 2**17)
        return [advise("a_bf16_w_int8", large, room), advise("a_bf16_w_int4", small, room)]

    found = [choose(rows(room * GIB)) for room in (9, 6)]

    assert [each and each.precision for each in found] == ["a_bf16_w_int8", "a_bf16_w_int4"]


def test_the_printed_toml_can_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    write_byte_tokenizer(folder)

    assert main(["tune", str(folder)]) == 0

    printed = capsys.readouterr().out
    assert printed.count("<- advised") == 1
    (tmp_path / "config.toml").write_text("[[model]]" + printed.split("[[model]]")[1])
    (spec,) = load_config(tmp_path / "config.toml").model
    assert (spec.name, spec.path, spec.build_seq) == ("tiny", str(folder), 128)


def test_a_model_that_is_not_here_has_to_be_pulled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BRLITE_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    assert main(["tune", "org/model:Q8_0"]) == 2
    assert "`brlite pull org/model:Q8_0` fetches it" in capsys.readouterr().err


@pytest.mark.usefixtures("native_library")
def test_a_quantized_file_keeps_its_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BRLITE_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    assert main(["tune"]) == 0  # the default model, whose sizes are known before it is here

    printed = capsys.readouterr().out
    assert re.search("auto .*<- advised", printed)
    assert re.search("^a_int8_w_int8 ", printed, re.MULTILINE)
    assert '\nprecision = "auto"\n' in printed


def test_where_a_card_computes_its_memory_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def known_sizes(spec: ModelSpec, engine: EngineConfig) -> Sizes:
        if spec.precision == "a_int8_w_int8":
            raise ConfigError("precision a_int8_w_int8 is of native kernels only")
        return msgspec.structs.replace(sizes(14 * GIB, 2**17), is_on_card=True, free_bytes=70 * GIB)

    monkeypatch.setattr("brlite.commands.tune.known_sizes", known_sizes)
    monkeypatch.setattr("brlite.commands.tune.find_memory", lambda: Memory(4 * GIB, 2 * GIB))

    assert main(["tune", str(write_tiny_model(tmp_path / "tiny"))]) == 0

    printed = capsys.readouterr().out
    assert printed.startswith("75.2 GB of the card's memory are free\n")
    assert "does not fit" not in printed
    assert "a_int8_w_int8" not in printed
