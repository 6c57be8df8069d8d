"""The whole engine on a card that torch takes for a Biren one, emulated on the CPU, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils import backend_registration

ROOT = Path(__file__).parents[2]
EMULATED = ROOT / "tests" / "emulated"
DRAWING = {"aten::topk", "aten::sort", "aten::argmax", "aten::cumsum", "aten::_log_softmax", "aten::gather"}

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="only newer versions of torch can emulate a device in Python",
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `run_engine.py` found."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (EMULATED, ROOT)))}
    command = [sys.executable, str(EMULATED / "run_engine.py"), str(tmp_path_factory.mktemp("emulated"))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_tokens_are_those_of_the_cpu(report: dict[str, Any]) -> None:
    for tokens in report["tokens"].values():
        assert tokens["supa"] == tokens["cpu"]
        assert {len(completion) for prompt in tokens["supa"] for completion in prompt} == {4}


def test_bfloat16_runs_and_is_what_the_card_takes_by_itself(report: dict[str, Any]) -> None:
    assert report["doctor"]["computes in"] == "bfloat16"
    assert {len(completion) for prompt in report["bfloat16"] for completion in prompt} == {4}


def test_int8_weights_stay_int8(report: dict[str, Any]) -> None:
    info = report["info"]["mistral-window"]

    assert info["supa"]["weight_bytes"] < 0.4 * info["cpu"]["weight_bytes"]  # in float32 there, embedding and all
    assert info["supa"]["notes"] == []
    assert "dequantized" in info["cpu"]["notes"][0]


def test_nothing_is_drawn_on_the_card(report: dict[str, Any]) -> None:
    assert DRAWING.isdisjoint(report["operators"])


def test_the_card_is_found_and_named_with_its_plugin(report: dict[str, Any]) -> None:
    assert report["auto"] == "supa:0"
    assert report["info"]["llama"]["supa"]["device"].startswith("supa:0 (torch_supa ")


def test_the_doctor_probes_it(report: dict[str, Any]) -> None:
    assert report["doctor"]["device"].startswith("supa:0")
    assert report["doctor"]["probe"].startswith("cosine 0.99")
    assert "error" not in report["doctor"]


def test_a_card_on_which_any_operator_is_wrong_is_refused(report: dict[str, Any]) -> None:
    assert len(report["refusals"]) > 5
    for operator, refusal in report["refusals"].items():
        assert "computes nonsense" in refusal, operator
        assert "allowed are a cosine from 0.999" in refusal
        assert "\n" not in refusal


def test_no_model_is_served_from_such_a_card(report: dict[str, Any]) -> None:
    assert "computes nonsense" in report["not_served"]


def test_an_operator_that_falls_back_to_the_cpu_is_told_of(report: dict[str, Any]) -> None:
    assert report["slow"] == ["slow: torch runs aten::index_copy_, aten::silu on the CPU, not on the device"]


def test_what_an_operator_lacks_is_said_in_one_line(report: dict[str, Any]) -> None:
    assert "cannot compute a tiny model: aten::mm is not there" in report["lacking"]
