"""How embeddings are made, as the files of models say it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from brlite.checkpoint.gguf_config import GgufMetadata, hugging_face_config
from brlite.checkpoint.pooling_config import settle_pooling
from brlite.config.options import ModelSpec
from brlite.conversion.convert import read_side_files
from brlite.errors import ModelError
from tests.tiny_models import write_tiny_model

SPEC = ModelSpec(name="tiny")
FLAGS = {
    "word_embedding_dimension": 64,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_lasttoken": False,
    "include_prompt": True,
}
MODULES = [
    {"idx": index, "name": str(index), "path": "", "type": f"sentence_transformers.models.{name}"}
    for index, name in enumerate(("Transformer", "Pooling", "Normalize"))
]


def write_files(folder: Path, pooling: Any = None, modules: Any = None) -> Path:
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    if modules is not None:
        (folder / "modules.json").write_text(json.dumps(modules))
    return folder


@pytest.mark.parametrize(
    ("pooling", "modules", "expected"),
    [
        (None, None, "last"),
        ({**FLAGS, "pooling_mode_lasttoken": True}, MODULES, "last"),
        ({**FLAGS, "pooling_mode_mean_tokens": True}, MODULES, "mean"),
        ({"pooling_mode": "mean"}, MODULES, "mean"),  # sentence-transformers 5
        ({**FLAGS, "pooling_mode_cls_token": True}, MODULES, "none"),
        ({**FLAGS, "pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}, MODULES, "none"),
        (FLAGS, MODULES, "none"),
        ({"pooling_mode": "mean"}, [*MODULES, {"type": "sentence_transformers.models.Dense"}], "none"),
        ({"pooling_mode": "\x1b[2J\n" + "x" * 10**6}, MODULES, "none"),
        ({"pooling_mode_\x1b[2J\n" + "x" * 10**6: True}, MODULES, "none"),
    ],
)
def test_pooling_is_that_of_the_sentence_transformers_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, pooling: Any, modules: Any, expected: str
) -> None:
    with caplog.at_level(logging.WARNING):
        spec = settle_pooling(write_files(tmp_path, pooling, modules), {}, SPEC)

    assert spec.pooling == expected
    lines = [record.getMessage() for record in caplog.records]
    assert [line.startswith("model tiny: embeddings are refused") for line in lines] == [True] * (expected == "none")
    assert all(line.isprintable() and len(line) < 300 for line in lines)


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"a": ' + "[" * 5000 + "]" * 5000 + "}]", '{"a": 1}', "[1]"])
def test_modules_of_another_shape_are_refused_in_a_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)

    with pytest.raises(ModelError, match=r"modules\.json: must hold a JSON list of objects: ") as refusal:
        settle_pooling(tmp_path, {}, SPEC)

    assert str(refusal.value).isprintable()


def test_the_config_goes_before_the_files(tmp_path: Path) -> None:
    folder = write_files(tmp_path, {"pooling_mode": "cls"}, MODULES)

    assert settle_pooling(folder, {}, ModelSpec(name="tiny", pooling="mean")).pooling == "mean"


@pytest.mark.parametrize("config", [{"is_causal": False}, {"use_bidirectional_attention": True}])
def test_a_model_that_attends_in_both_directions_has_no_embeddings_here(tmp_path: Path, config: dict[str, Any]) -> None:
    assert settle_pooling(tmp_path, config, SPEC).pooling == "none"


@pytest.mark.parametrize(
    ("config", "option", "expected"),
    [
        ({}, (), ()),
        ({"is_matryoshka": True}, (), (0,)),
        ({"is_matryoshka": True, "matryoshka_dimensions": [256, 64]}, (), (64, 256)),
        ({"matryoshka_dimensions": "all"}, (), ()),
        ({"matryoshka_dimensions": [256, 0], "is_matryoshka": True}, (), (0,)),
        ({"matryoshka_dimensions": [256], "is_matryoshka": "yes"}, (), (256,)),
        ({"matryoshka_dimensions": None, "is_matryoshka": None}, (), ()),
        ({"matryoshka_dimensions": [256]}, (32,), (32,)),
    ],
)
def test_lengths_come_from_the_config_json_unless_the_option_names_them(
    tmp_path: Path,
    config: dict[str, Any],
    option: tuple[int, ...],
    expected: tuple[int, ...],
    caplog: pytest.LogCaptureFixture,
) -> None:
    spec = settle_pooling(tmp_path, config, ModelSpec(name="tiny", matryoshka_dimensions=option))

    assert spec.matryoshka_dimensions == expected
    assert ("it is ignored" in caplog.text) == (
        "yes" in config.values() or config.get("matryoshka_dimensions") in ("all", [256, 0])
    )


@pytest.mark.parametrize("kind", ["mean", [1], {"a": 1}, True, None])
def test_a_pooling_type_that_is_no_number_of_ggufs_turns_embeddings_off(tmp_path: Path, kind: object) -> None:
    assert settle_pooling(tmp_path, {"pooling_type": kind}, SPEC).pooling == "none"


@pytest.mark.parametrize("content", ["[", "{}", "[1]", "\x00"])
def test_a_broken_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "modules.json").write_text(content)

    with pytest.raises(ModelError, match=r"modules\.json"):
        settle_pooling(tmp_path, {}, SPEC)


def test_a_bundle_keeps_the_pooling(tmp_path: Path) -> None:
    model, bundle = write_tiny_model(tmp_path / "model"), tmp_path / "bundle"
    write_files(model, {"pooling_mode": "mean"}, MODULES)
    bundle.mkdir()

    for name, content in read_side_files(model, {}).items():
        (bundle / name).write_bytes(content)

    assert settle_pooling(bundle, {}, SPEC).pooling == "mean"


@pytest.mark.parametrize(("number", "expected"), [(None, "last"), (0, "last"), (1, "mean"), (2, "none"), (3, "last")])
def test_a_gguf_files_pooling_type_is_taken(tmp_path: Path, number: int | None, expected: str) -> None:
    sizes = ("context_length", "embedding_length", "feed_forward_length", "block_count", "attention.head_count")
    values: dict[str, Any] = {"general.architecture": "qwen2", "qwen2.attention.layer_norm_rms_epsilon": 1e-6}
    values |= {f"qwen2.{size}": 8 for size in sizes} | ({} if number is None else {"qwen2.pooling_type": number})
    config = hugging_face_config(GgufMetadata(values), {"model.embed_tokens.weight": (8, 8)}, None)

    assert settle_pooling(tmp_path / "model.gguf", config, SPEC).pooling == expected
