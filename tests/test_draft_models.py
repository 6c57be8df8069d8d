"""A draft model beside the one that it drafts for, both real: the tokens stay the same, and bad ones are refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from brlite.backends.choose import load_backend
from brlite.backends.sizes import sizes_at
from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.checked_model import check_model
from brlite.commands import check
from brlite.config.load import load_config
from brlite.config.options import Config, DraftConfig, EngineConfig, LimitsConfig, ModelSpec
from brlite.config.warnings import config_warnings
from brlite.engine.backend import CPU_ROWS, Batch, ScheduledSeq
from brlite.engine.engine import Engine
from brlite.engine.stats import EngineStats
from brlite.engine.step_costs import DraftCost, StepCosts
from brlite.errors import ConfigError, EngineError, ModelError
from brlite.llm import LLM, AsyncEngine, build_engine
from brlite.sampling_params import SamplingParams, StructuredOutput
from tests.tiny_models import write_byte_tokenizer, write_tiny_model

pytestmark = pytest.mark.torch

PROMPTS = ["The first prompt", "a second", "The first prompt, and more of it"]
PARAMS = [
    SamplingParams(max_tokens=40, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=40, temperature=1.0, seed=7, ignore_eos=True, logprobs=1),
    SamplingParams(max_tokens=40, temperature=1.0, seed=8, top_k=20, structured=StructuredOutput(regex="[a-z]{9,30}")),
]
Answers = list[tuple[list[int], Any]]


class CheapDrafts(DraftCost):
    """Drafts cost nothing, so they are made: a tiny model takes no less time than another one."""

    def per_draft_token(self, num_seqs: int) -> float:
        return 0.0


class ExpectedCosts(StepCosts):
    """Steps cost what is expected: those of a tiny model take too little time to tell what their rows cost."""

    def observe(self, num_rows: int, seconds: float, *, has_drafts: bool) -> None:
        pass


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of one vocabulary with other weights; one of another vocabulary."""
    root = tmp_path_factory.mktemp("models")
    made = {name: write_tiny_model(root / name, seed=seed) for name, seed in (("served", 0), ("other", 1), ("odd", 2))}
    for name, path in made.items():
        write_byte_tokenizer(path)
        if name == "odd":
            tokenizer = path / "tokenizer.json"
            tokenizer.write_text(tokenizer.read_text().replace('"a":', '"bb":', 1))
    return made


def make_config(folders: dict[str, Path], draft: str | None, **model: Any) -> Config:
    of_draft = None if draft is None else DraftConfig(path=str(folders[draft]))
    fields = {"name": "tiny", "path": str(folders["served"]), "build_seq": 128, "build_batch": 4, "draft": of_draft}
    return Config(model=(ModelSpec(**{**fields, **model}),))


def answer(config: Config, every_params: list[SamplingParams] = PARAMS) -> tuple[Answers, EngineStats]:
    with LLM(config=config) as llm:
        if llm._engine.draft_model is not None:
            llm._engine.draft_model.cost = CheapDrafts(0.0)
            llm._engine._scheduler.speculation.step_costs = ExpectedCosts(CPU_ROWS)
        outputs = [output.outputs[0] for params in every_params for output in llm.generate(PROMPTS, params)]
        return [(output.token_ids, output.logprobs) for output in outputs], llm._engine.stats


@pytest.mark.parametrize("pressure", [{}, {"num_blocks": 9}], ids=["room", "preempted"])
def test_a_model_that_drafts_for_itself_is_right_greedy_and_seeded(
    folders: dict[str, Path], pressure: dict[str, Any]
) -> None:
    expected, _ = answer(make_config(folders, None), PARAMS[:2])

    found, stats = answer(make_config(folders, "served", **pressure), PARAMS[:2])

    assert found == expected
    assert stats.accepted_tokens == stats.draft_tokens > 150
    assert (stats.preemptions > 0) == bool(pressure)


def test_a_model_that_drafts_wrong_changes_nothing(folders: dict[str, Path]) -> None:
    expected, _ = answer(make_config(folders, None))

    found, stats = answer(make_config(folders, "other"))

    assert found == expected
    assert 0 <= stats.accepted_tokens < stats.draft_tokens


def test_one_process_drafts_for_native_ranks(folders: dict[str, Path]) -> None:
    expected, _ = answer(make_config(folders, None), PARAMS[:2])

    found, stats = answer(make_config(folders, "served", tensor_parallel=2, devices=(0, 1)), PARAMS[:2])

    assert found == expected
    assert stats.accepted_tokens == stats.draft_tokens > 150


def test_torch_drafts_for_native_kernels(folders: dict[str, Path]) -> None:
    expected, _ = answer(make_config(folders, None))
    config = make_config(folders, None)
    built = build_engine(config)
    spec = config.model[0]
    checkpoint = open_checkpoint(folders["served"])
    engine = EngineConfig(backend="torch", device="cpu", dtype="float32")
    draft_backend = load_backend(checkpoint, check_model(checkpoint, spec), spec, engine)
    engine = Engine(
        built.backend.info, built.engine.tokenizer, config.engine, LimitsConfig(), draft_backend=draft_backend
    )
    assert engine.draft_model is not None
    engine.draft_model.cost = CheapDrafts(0.0)
    engine._scheduler.speculation.step_costs = ExpectedCosts(CPU_ROWS)

    async def ask() -> list[list[int]]:
        async with AsyncEngine(engine, built.backend) as loop:

            async def tokens(prompt: str) -> list[int]:
                return [
                    token async for output in loop.generate(prompt, PARAMS[0]) for token in output.outputs[0].token_ids
                ]

            return await asyncio.gather(*map(tokens, PROMPTS))

    assert asyncio.run(ask()) == [token_ids for token_ids, _ in expected[: len(PROMPTS)]]
    assert engine.stats.accepted_tokens > 20


def test_its_memory_is_counted_and_check_prints_it(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "brlite.toml"
    file.write_text(
        f'[[model]]\nname = "tiny"\npath = "{folders["served"]}"\nbuild_seq = 128\nbuild_batch = 2\n'
        f'[model.draft]\npath = "{folders["other"]}"\n'
    )
    config = load_config(file)

    assert check.check(file) == 0
    sizes = sizes_at(folders["served"], config.model[0], config.engine)
    with LLM(config=config) as llm:
        assert llm._engine.draft_model is not None
        info = llm._engine.draft_model.info

    assert sizes.draft is not None
    assert sizes.draft.kv_bytes == info.kv_bytes > 0
    assert sizes.draft.weight_bytes == sizes.weight_bytes > info.weight_bytes / 2
    assert sizes.num_bytes == sizes.weight_bytes + sizes.kv_bytes + sizes.draft.weight_bytes + info.kv_bytes
    assert f"  draft     {folders['other']}: " in capsys.readouterr().out


def test_a_draft_model_of_another_vocabulary_is_refused_in_one_line(folders: dict[str, Path]) -> None:
    config = make_config(folders, "odd")

    with pytest.raises(
        ModelError, match=r"needs the vocabulary of the model that it drafts for, tiny: token "
    ) as caught:
        LLM(config=config)

    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="needs the vocabulary of the model that it drafts for"):
        check.inspect_model(config.model[0], config.engine)


def test_a_draft_model_beside_an_engine_plugin_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "brlite.toml"
    file.write_text('[engine]\nname = "toy"\n[[model]]\n[model.draft]\npath = "/models/small"\n')

    with pytest.raises(ConfigError) as caught:
        check.check(file)

    assert [line.partition("brlite.toml: ")[2] for line in str(caught.value).splitlines()] == [
        "model[0].draft: engine toy takes no draft model; allowed is one without engine.name",
    ]


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ("draft = 3", "model[0].draft = 3: allowed is a table of path, precision"),
        ("draft = {}", "model[0].draft.path is missing: allowed is a non-empty string"),
        ('draft = { path = "x", size = 3 }', "model[0].draft.size = 3: no such field; allowed are path, precision"),
    ],
)
def test_a_wrong_draft_table_is_one_line(tmp_path: Path, toml: str, problem: str) -> None:
    file = tmp_path / "brlite.toml"
    file.write_text(f"[[model]]\n{toml}\n")

    with pytest.raises(ConfigError) as caught:
        load_config(file)

    assert str(caught.value) == f"{file}: {problem}"


def test_a_draft_model_that_is_not_there_is_refused(folders: dict[str, Path]) -> None:
    config = make_config({**folders, "gone": Path("/proc/absent/model")}, "gone")

    with pytest.raises(ModelError, match="draft: model path /proc/absent/model does not exist"):
        LLM(config=config)


def test_a_backend_that_cannot_verify_refuses_a_draft_model(folders: dict[str, Path]) -> None:
    config = msgspec.structs.replace(make_config(folders, "other"), engine=EngineConfig(backend="torch", device="cpu"))

    with pytest.raises(ConfigError, match="draft: the torch backend cannot verify drafts"):
        LLM(config=config)


def test_without_speculation_it_is_not_loaded_and_the_start_says_so(folders: dict[str, Path]) -> None:
    config = msgspec.structs.replace(make_config(folders, "other"), engine=EngineConfig(speculation="off"))

    with LLM(config=config) as llm:
        assert llm._engine.draft_model is None

    assert 'model[0].draft: has no effect with engine.speculation = "off"' in config_warnings(config)


def test_a_model_that_nobody_takes_frees_its_draft_model_too(folders: dict[str, Path]) -> None:
    assembly = build_engine(make_config(folders, "other"))

    assembly.close()

    assert len(assembly.backends) == 2
    for backend in assembly.backends:
        with pytest.raises(EngineError, match="closed"):
            backend.execute(Batch([ScheduledSeq(0, 0, [1], [0])]))


def test_drafts_that_are_asked_for_are_refused_where_they_cannot_be_verified(folders: dict[str, Path]) -> None:
    engine = EngineConfig(backend="torch", device="cpu", speculation="on")
    config = msgspec.structs.replace(make_config(folders, None), engine=engine)

    with pytest.raises(
        ConfigError, match=r'engine\.speculation is "on", but the torch backend cannot verify'
    ) as caught:
        LLM(config=config)

    assert "\n" not in str(caught.value)
