"""`brlite doctor`: what it looks at, and how it prints."""

from __future__ import annotations

import json
import sys

import brlite
from brlite.doctor import examine, render, run


def test_every_section_has_findings():
    report = examine()

    assert report["versions"]["brlite"] == brlite.__version__
    assert report["versions"]["torch"][0].isdigit()
    assert "free" in report["machine"]["memory"]
    assert report["device"]["path"].startswith("torch;")
    assert report["model"]["default model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_findings_are_aligned_under_their_section():
    text = render({"one": {"a": "1", "long name": "2"}, "two": {"b": "3"}})

    assert text.splitlines() == ["one", "  a          1", "  long name  2", "two", "  b          3"]


def test_the_report_is_printed_as_json_on_request(capsys):
    status = run(as_json=True)

    assert status == 0
    assert json.loads(capsys.readouterr().out).keys() == {"versions", "machine", "device", "model"}


def test_a_torch_that_cannot_be_imported_is_reported(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "brlite.worker.device", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)

    status = run(as_json=False)

    assert status == 1
    assert "torch cannot be used: " in capsys.readouterr().out
