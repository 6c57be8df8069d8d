"""`brlite doctor`: what it looks at, and how it prints."""

from __future__ import annotations

import json
import sys
from argparse import Namespace

import pytest

import brlite
from brlite.commands.doctor import describe_native, describe_nodes, examine, render, run
from brlite.errors import NativeUnavailable


def test_every_section_has_findings_which_are_printed_as_json_on_request(capsys):
    status = run(Namespace(json=True))

    report = json.loads(capsys.readouterr().out)
    assert status == 0
    assert report.keys() == {"versions", "extras", "machine", "native kernels", "torch", "model", "serve"}
    assert report["versions"]["brlite"] == brlite.__version__
    assert report["versions"]["aiohttp"][0].isdigit()
    assert report["extras"].keys() == {"torch", "ray"}
    assert "free" in report["machine"]["memory"]
    assert report["machine"]["threads"].partition(", ")[2]  # what decided
    assert report["native kernels"]["library"]
    assert report["model"]["default model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert report["model"]["its precision"].endswith("(auto)")


def test_findings_are_aligned_under_their_section():
    text = render({"one": {"a": "1", "long name": "2"}, "two": {"b": "3"}})

    assert text.splitlines() == ["one", "  a          1", "  long name  2", "two", "  b          3"]


@pytest.mark.parametrize(
    ("nodes", "shown"),
    [
        ({}, "1"),
        ({0: {0}, 1: set()}, "node 0 with 1 CPUs, node 1 with 0 CPUs; the weights are kept on node 0"),
        (
            {0: {0, 1}, 1: {2, 3}, 2: set()},
            "node 0 with 2 CPUs, node 1 with 2 CPUs, node 2 with 0 CPUs; "
            "weights are spread over nodes 0 and 1; tensor_parallel = 2 gives each its own",
        ),
    ],
)
def test_what_is_done_about_numa_nodes_is_shown(nodes, shown):
    assert describe_nodes(nodes) == shown


def test_the_native_library_is_described_with_its_self_tests(native_library):
    findings = describe_native(lambda: native_library)

    assert findings["library"] == str(native_library.path)
    assert findings["instruction set"] == native_library.isa_name
    assert findings["self-tests"].startswith("generic passed")


def test_a_native_library_that_is_missing_is_explained():
    def find() -> None:
        raise NativeUnavailable("there is no compiler")

    assert describe_native(find) == {"error": "there is no compiler"}


def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)


def test_without_torch_native_kernels_compute_and_the_extra_is_named(monkeypatch, native_library):
    without_torch(monkeypatch)

    report = examine()

    assert report["torch"]["not used"].endswith("pip install 'brlite[torch]'")
    assert report["serve"] == {"models are computed by": "native kernels"}


def test_where_nothing_computes_the_status_is_1_and_both_remedies_are_named(monkeypatch, capsys):
    def find() -> None:
        raise NativeUnavailable("no C++ compiler was found; install one")

    without_torch(monkeypatch)
    monkeypatch.setattr("brlite.commands.doctor.find_library", find)

    status = run(Namespace(json=False))

    assert status == 1
    nothing = "nothing computes models here: no C++ compiler was found; install one; or: pip install 'brlite[torch]'"
    assert nothing in capsys.readouterr().out
