"""Engines by name: those of the installation, and what is wrong with one, said before it serves."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from brlite.backends.plugins.builtin import BuiltinEngine
from brlite.backends.plugins.contract import Capabilities
from brlite.backends.plugins.discovery import check_capabilities, check_engine_name, make_engine
from brlite.backends.plugins.suinfer_llm import SuinferLlm
from brlite.backends.plugins.toy import ToyEngine
from brlite.config.options import EngineConfig, ModelSpec
from brlite.errors import BrliteError, ConfigError

CAPABILITIES = Capabilities(name="x", max_seqs=2, max_model_len=64, vocab_size=100)


@pytest.mark.parametrize(("name", "kind"), [("brlite", BuiltinEngine), ("toy", ToyEngine), ("suinfer_llm", SuinferLlm)])
def test_what_brlite_brings_is_found_by_its_name(name: str, kind: type) -> None:
    check_engine_name(name)

    assert isinstance(make_engine(name), kind)


def test_a_name_that_is_not_installed_is_refused_with_those_that_are() -> None:
    for ask in (check_engine_name, make_engine):
        with pytest.raises(ConfigError, match=r"there is no engine 'tyo'; installed are brlite, suinfer_llm, toy"):
            ask("tyo")


def test_an_installed_engine_is_found_and_one_that_cannot_be_imported_named(tmp_path, monkeypatch) -> None:
    package = tmp_path / "others-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    lines = ["[brlite.engines]", "good = others_engine:Good", "bad = others_engine:Bad", "absent = no_such_module:X"]
    (package / "entry_points.txt").write_text("\n".join(lines))
    (tmp_path / "others_engine.py").write_text("class Good: pass\n")
    monkeypatch.syspath_prepend(tmp_path)

    good = make_engine("good")

    assert type(good).__name__ == "Good"
    for name in ("bad", "absent"):
        with pytest.raises(ConfigError, match=rf"engine {name} \(.*\) cannot be imported: "):
            make_engine(name)


def test_the_template_for_suinfer_refuses_and_says_what_to_do() -> None:
    template = make_engine("suinfer_llm")

    with pytest.raises(ConfigError, match=r"template.*fill in open, step, release and close"):
        template.open(ModelSpec(name="m"), EngineConfig(name="suinfer_llm"))
    template.close()


@pytest.mark.parametrize(
    ("claims", "spec", "message"),
    [
        ({"max_seqs": 0}, {}, "engine x: max_seqs = 0; allowed is 1 or more"),
        ({"vocab_size": 0}, {}, "engine x: vocab_size = 0; allowed is 1 or more"),
        ({"max_row_tokens": -1}, {}, "engine x: longest_row = -1; allowed is 1 or more"),
        ({"max_row_tokens": 8}, {}, "engine x: max_row_tokens = 8 needs can_chunk_prompts"),
        ({"tolerance": 0.5}, {}, "engine x: tolerance = 0.5; allowed is 0 to 0.1"),
        ({"tolerance": float("nan")}, {}, "engine x: tolerance = nan; allowed is 0 to 0.1"),
        ({}, {"vocab_size": 99}, "vocab_size is 99; engine x gives 100 logits"),
    ],
)
def test_capabilities_that_cannot_be_are_refused(claims: dict[str, Any], spec: dict[str, Any], message: str) -> None:
    with pytest.raises(BrliteError) as refusal:
        check_capabilities(msgspec.structs.replace(CAPABILITIES, **claims), ModelSpec(name="m", **spec))

    assert str(refusal.value) == message
