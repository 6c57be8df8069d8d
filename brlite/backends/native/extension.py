"""Builds the native library when brlite is installed, with build.py, exactly as the first start would.

For setuptools the library is an extension, which is installed beside the package. It is optional: without a working
compiler brlite is installed without it. Python does not import it; library.py loads it. This file is also the build
backend that pyproject.toml names: that of setuptools, which also requires what makes the man page and completions,
and ziglang if the system has no compiler.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setuptools import Extension, build_meta
from setuptools.build_meta import (  # the hooks that stay setuptools'
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

from brlite.backends.native.build import ZIG_PACKAGE, build_library, find_compiler, is_current
from brlite.errors import NativeUnavailable

__all__ = [
    "BuildNative",
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

PAGE_PACKAGES = ("argparse_manpage>=4.6", "shtab>=1.6")  # of commands/shared_files.py
Settings = Mapping[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """PEP 517: packages that a build needs in addition to `build-system.requires`."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *PAGE_PACKAGES, *_missing_compiler()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """PEP 660: the same, for an editable install, which has no man page and no completions."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_missing_compiler()]


def _missing_compiler() -> list[str]:
    try:
        find_compiler()
    except NativeUnavailable:
        return [ZIG_PACKAGE]
    return []


class BuildNative(build_ext):
    """`build_ext`, with a compiler process for each source file and flags that keep all results the same."""

    built_before = Path(__file__).with_name("_native.so")  # by an editable install of the same sources

    def get_ext_filename(self, fullname: str) -> str:
        """Without a tag of the Python version: any can load it."""
        return f"{os.path.join(*fullname.split('.'))}.so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        if is_current(self.built_before):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.built_before, target)
            return
        try:
            build_library(target)
        except NativeUnavailable as error:
            raise CompileError(f"brlite is installed without native kernels: {error}") from error
