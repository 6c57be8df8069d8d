"""`brlite doctor`: what it looks at, and how it prints."""

from __future__ import annotations

import json
import sys

import brlite
from brlite.commands.doctor import describe_native, examine, render, run
from brlite.errors import NativeUnavailable


def test_every_section_has_findings():
    report = examine()

    assert report["versions"]["brlite"] == brlite.__version__
    assert report["versions"]["torch"][0].isdigit()
    assert "free" in report["machine"]["memory"]
    assert report["machine"]["threads"].partition(", ")[2]  # what decided
    assert report["native kernels"]["library"]
    assert report["model"]["default model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_findings_are_aligned_under_their_section():
    text = render({"one": {"a": "1", "long name": "2"}, "two": {"b": "3"}})

    assert text.splitlines() == ["one", "  a          1", "  long name  2", "two", "  b          3"]


def test_the_report_is_printed_as_json_on_request(capsys):
    status = run(as_json=True)

    assert status == 0
    assert json.loads(capsys.readouterr().out).keys() == {"versions", "machine", "device", "native kernels", "model"}


def test_the_native_library_is_described_with_its_self_tests(native_library):
    findings = describe_native(lambda: native_library)

    assert findings["library"] == str(native_library.path)
    assert findings["instruction set"] == native_library.isa_name
    assert findings["self-tests"].startswith("generic passed")


def test_a_native_library_that_is_missing_is_explained():
    def find() -> None:
        raise NativeUnavailable("there is no compiler")

    assert describe_native(find) == {"library": "none, so torch computes: there is no compiler"}


def test_a_torch_that_cannot_be_imported_is_reported(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "brlite.backends.torch.device", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)

    status = run(as_json=False)

    printed = capsys.readouterr().out
    assert "torch cannot be used: " in printed
    assert status == (0 if "self-tests" in printed else 1)  # native kernels, where there are some, need no torch
