"""How an engine is chosen: on the command line, in the environment, in a config; and what then changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from brlite.backends.plugins import discovery
from brlite.backends.plugins.contract import Capabilities
from brlite.commands.cli import main
from brlite.commands.serve import ModelLoader
from brlite.config.load import load_config
from brlite.config.options import Config, EngineConfig, ModelSpec
from brlite.config.validation import engine_override, override
from brlite.config.warnings import check_supported, config_warnings
from brlite.errors import ConfigError, ModelError
from brlite.llm import LLM, EngineLoader, build_engine
from brlite.sampling_params import SamplingParams
from tests.tiny_models import write_byte_tokenizer, write_tiny_model

TOY = Config(engine=EngineConfig(name="toy"), model=(ModelSpec(name="m", build_seq=64, build_batch=2),))
MANUAL = {
    "model": "m",
    "input_name": "input_ids.1",
    "output_name": "9",
    "vocab_size": 260,
    "model_file": "/models/m.pt",
    "serialize_file": "",
    "model_precision": "a_bf16_w_int8_kv_int8",
    "build_seq": 128,
    "build_batch": 4,
    "distribute_param": [2, 1, 1],
    "devices": [0, 1],
    "all_models": {"http://host_ip:port": "m"},
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start in an empty folder and without an engine in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BRLITE_ENGINE", raising=False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("toy", {"engine.name": "toy"}),
        ("native", {"engine.name": None, "engine.backend": "native"}),
        ("auto", {"engine.name": None, "engine.backend": "auto"}),
        (None, {}),
    ],
)
def test_a_name_is_an_installed_engine_or_a_backend_of_ours(name: str | None, expected: dict[str, Any]) -> None:
    assert engine_override(name) == expected


@pytest.mark.parametrize("option", ["fail_every", "=3", "fail_every="])
def test_an_option_without_a_name_or_a_value_is_refused(capsys, option: str) -> None:
    assert main(["serve", "--engine", "toy", "--engine-option", option]) == 2

    assert f"--engine-option {option}: allowed is NAME=VALUE" in capsys.readouterr().err


def test_the_offline_script_of_the_manual_takes_the_environments(monkeypatch) -> None:
    Path("m.json").write_text(json.dumps(MANUAL))
    monkeypatch.setenv("BRLITE_ENGINE", "toy")

    with LLM(config_path="m.json") as llm:
        (output,) = llm.generate("hello", SamplingParams(max_tokens=9))

    assert output.outputs[0].text == "hello"


def test_a_config_of_a_program_is_taken_as_it_is(monkeypatch) -> None:
    monkeypatch.setenv("BRLITE_ENGINE", "tyo")

    with LLM(config=TOY) as llm:
        assert llm.generate("hello")[0].outputs[0].text == "hello"


def test_an_engine_that_is_not_there_is_one_line(capsys) -> None:
    Path("c.toml").write_text('[engine]\nname = "tyo"\n')

    statuses = [main([*command, "c.toml"]) for command in (["check"], ["engine-check", "--config"], ["verify"])]

    assert statuses == [2, 2, 2]
    assert capsys.readouterr().err.count("there is no engine 'tyo'; installed are brlite, suinfer_llm, toy") == 3


def test_check_says_who_computes(capsys) -> None:
    Path("c.toml").write_text('[engine]\nname = "toy"\n')

    assert main(["check", "c.toml"]) == 0

    shown = capsys.readouterr().out
    assert "  from      engine toy" in shown
    assert 'name = "toy"' in shown


def test_what_has_no_effect_on_another_engine_is_said() -> None:
    config = override(TOY, {"engine.memory_gib": 3, "engine.block_size": 32, "model[0].num_blocks": 9})
    stray = Config(engine=EngineConfig(options={"a": 1}))

    without_effect = [line.partition(": has no effect")[0] for line in config_warnings(config)]

    assert without_effect == ["engine.block_size", "engine.memory_gib", "model[0].num_blocks"]
    assert config_warnings(stray) == ["engine.options: have no effect without engine.name"]


def test_tensor_parallelism_is_the_other_engines_matter() -> None:
    Path("m.json").write_text(json.dumps(MANUAL))

    check_supported(override(load_config(Path("m.json")), {"engine.name": "toy"}))


def test_a_chat_template_that_is_not_used_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with LLM(config=override(TOY, {"model[0].chat_template": "own.jinja"})):
        pass

    assert "model m: chat_template is not used" in caplog.text


async def test_its_memory_is_not_ours_to_count() -> None:
    assert await ModelLoader(TOY).known_bytes(TOY.model[0]) == 0


@pytest.mark.parametrize(("engine", "needs_files"), [("toy", False), ("suinfer_llm", True), ("brlite", True)])
async def test_the_files_of_an_engine_are_fetched_before_its_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, engine: str, needs_files: bool
) -> None:
    class FakeDownload:
        def __init__(self, *_: object) -> None: ...

        def run(self, seconds: float, *, is_for_plugin: bool) -> Path:
            downloads.append(is_for_plugin)
            return tmp_path

    downloads: list[bool] = []
    for name in ("HF_HOME", "BRLITE_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("brlite.checkpoint.fetch.Download", FakeDownload)
    spec = ModelSpec(name="some/model")
    loaders = [make(Config(model=(spec,), engine=EngineConfig(name=engine))) for make in (EngineLoader, ModelLoader)]

    is_here = [await loader.is_here(spec) for loader in loaders]
    if needs_files:
        for loader in loaders:
            await loader.fetch(spec, lambda stage, fraction: None)

    assert is_here == [not needs_files] * 2
    assert downloads == [True, True] * needs_files


def test_an_engine_whose_tokenizer_is_too_large_for_it_is_refused_and_closed(tmp_path, monkeypatch) -> None:
    class Narrow:
        is_closed = False

        def open(self, spec: ModelSpec, config: EngineConfig) -> Capabilities:
            return Capabilities(name="narrow", max_seqs=2, max_model_len=64, vocab_size=100)

        def close(self) -> None:
            self.is_closed = True

    engine = Narrow()
    monkeypatch.setattr(discovery, "make_engine", lambda name: engine)
    write_byte_tokenizer(write_tiny_model(tmp_path / "tiny"))
    config = Config(engine=EngineConfig(name="narrow"), model=(ModelSpec(name="m", path=str(tmp_path / "tiny")),))

    with pytest.raises(ModelError, match=r"token ids up to \d+, the model only up to 99"):
        build_engine(config)

    assert engine.is_closed


def test_the_tokenizer_of_an_engine_that_does_not_open_is_closed(monkeypatch) -> None:
    closed = []

    class Closable:
        def close(self) -> None:
            closed.append(type(self).__name__)

    class NoCard(Closable):
        def tokenizer(self) -> Closable:
            return Closable()

        def open(self, spec: ModelSpec, config: EngineConfig) -> Capabilities:
            raise ConfigError("there is no card")

    monkeypatch.setattr(discovery, "make_engine", lambda name: NoCard())

    with pytest.raises(ConfigError, match="there is no card"):
        build_engine(Config(engine=EngineConfig(name="none"), model=(ModelSpec(name="m"),)))

    assert closed == ["NoCard", "Closable"]


def test_a_missing_model_folder_is_said_before_the_engine_opens(tmp_path) -> None:
    config = Config(
        engine=EngineConfig(name="suinfer_llm"), model=(ModelSpec(name="m", path=str(tmp_path / "absent")),)
    )

    with pytest.raises(ModelError, match="absent"):
        build_engine(config)
