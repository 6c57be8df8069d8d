"""`brlite engine-check`: its table, its JSON and its exit status."""

from __future__ import annotations

import json

import pytest

from brlite.backends.plugins.conformance.checks import CHECKS
from brlite.backends.plugins.toy import ToyEngine
from brlite.commands.cli import main
from brlite.commands.engine_check import print_report
from brlite.config.options import Config, EngineConfig, ModelSpec

CONFIG = Config(engine=EngineConfig(name="toy"), model=(ModelSpec(name="m", build_seq=64, build_batch=2),))


class Broken(ToyEngine):
    """Forgets nothing."""

    def release(self, slot: int) -> None:
        """Keep all."""


def test_an_engine_that_keeps_the_contract_has_a_table_and_status_0(capsys: pytest.CaptureFixture[str]) -> None:
    status = print_report(CONFIG, as_json=False)

    table = capsys.readouterr().out
    assert status == 0
    assert all(name in table for name in CHECKS)
    assert "engine toy keeps the contract: 20 checks passed, 3 were not tried" in table


def test_one_that_does_not_has_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    status = print_report(CONFIG, as_json=False, make=lambda name: Broken())

    table = capsys.readouterr().out
    assert status == 1
    assert "a released slot is clean          FAILED" in table
    assert "does not keep the contract" in table


def test_the_report_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(CONFIG, as_json=True, make=lambda name: Broken())

    report = json.loads(capsys.readouterr().out)
    assert not report["keeps_the_contract"]
    assert report["capabilities"]["max_seqs"] == 2
    assert [check["name"] for check in report["checks"]] == list(CHECKS)
    assert {check["result"] for check in report["checks"]} <= {"passed", "failed", "not tried"}


def test_the_command_takes_engine_options_and_a_config(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.toml").write_text('[[model]]\nname = "m"\nbuild_seq = 64\n')

    passed = main(["engine-check", "--engine", "toy", "--config", "c.toml"])
    failed = main(["engine-check", "--engine", "toy", "--config", "c.toml", "--engine-option", "fail_every=9"])

    assert (passed, failed) == (0, 1)
    assert "16 slots of 64 tokens" in capsys.readouterr().out


def test_an_engine_that_refuses_to_open_is_one_line_and_status_2(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)

    assert main(["engine-check", "--engine", "suinfer_llm"]) == 2

    assert "engine suinfer_llm is a template" in capsys.readouterr().err
