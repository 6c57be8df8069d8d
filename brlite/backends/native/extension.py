"""How setuptools builds the native library when brlite is installed: by build.py, exactly as the first start would.

It is an extension to setuptools so that it is put beside the package, and an optional one: without a compiler that
works, brlite installs all the same. Python never imports it; library.py loads it. pyproject.toml names this class.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError


class BuildNative(build_ext):
    """`build_ext`, with a compiler process for each source file and flags that keep all results the same."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without a tag of the Python version: any can load it."""
        return f"{os.path.join(*fullname.split('.'))}.so"

    def build_extension(self, ext: Extension) -> None:
        sys.path.insert(0, str(Path(__file__).parents[3]))  # a build does not run where brlite is installed
        from brlite.backends.native.build import build_library
        from brlite.errors import NativeUnavailable

        try:
            build_library(Path(self.get_ext_fullpath(ext.name)))
        except NativeUnavailable as error:
            raise CompileError(f"brlite computes with torch: {error}") from error
