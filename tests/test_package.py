"""What is published: the source distribution is whole, and its metadata is what an index shows."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

import brlite
from tests.test_house import imports

ROOT = Path(__file__).parent.parent
NAME = re.compile(r"[\w-]+")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> tarfile.TarFile:
    """Built from a copy, since a build leaves files behind."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-c", BUILD, str(target)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, env={"PATH": ""})
    return tarfile.open(next(target.glob("*.tar.gz")))


def tracked_files() -> list[str]:
    result = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a clone: git does not know the files")
    return [name for name in result.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_source_distribution_has_every_tracked_file(sdist: tarfile.TarFile) -> None:
    inside = {name.partition("/")[2] for name in sdist.getnames()}

    assert set(tracked_files()) - inside == set()


@pytest.fixture(scope="module")
def shown(sdist: tarfile.TarFile) -> Message:
    """What an index shows of it."""
    file = sdist.extractfile(f"brlite-{brlite.__version__}/PKG-INFO")
    assert file is not None
    return message_from_string(file.read().decode())


def test_an_index_shows_version_system_and_python(shown: Message) -> None:
    assert shown["Version"] == brlite.__version__
    assert "Operating System :: POSIX :: Linux" in shown.get_all("Classifier", [])
    assert shown["Requires-Python"] == ">=3.10"


def test_every_file_that_names_the_version_names_this_one() -> None:
    named = {
        "CITATION.cff": r"^version: (.+)$",
        "deploy/kubernetes/kustomization.yaml": r'^ +newTag: "(.+)"$',
    }
    found = {file: re.findall(line, (ROOT / file).read_text(), re.MULTILINE) for file, line in named.items()}
    date = re.search(r"^date-released: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]  # type: ignore[index]
    releases = re.findall(r"^## \[(\d.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)

    assert found == {file: [brlite.__version__] for file in named}
    assert releases[0] == f"{brlite.__version__}] - {date}"


def test_what_is_imported_is_required_and_nothing_else(shown: Message) -> None:
    lines = shown.get_all("Requires-Dist", [])
    required = {NAME.match(line)[0] for line in lines if "extra ==" not in line}  # type: ignore[index]
    extras = {NAME.match(line)[0] for line in lines if "extra ==" in line}  # type: ignore[index]
    files = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "brlite").rglob("*.py")]
    imported = {name.split(".")[0] for file in files for name in imports(file)}
    own_or_indirect = {"brlite", *sys.stdlib_module_names, "multidict", "yarl", "starlette", "tomllib"}

    # import_module gets sentencepiece and uvloop, by their names.
    assert required - {"sentencepiece", "uvloop"} == imported - extras - own_or_indirect
    assert {"torch", "ray"} <= extras
