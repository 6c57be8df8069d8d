"""Reads config files: TOML, or the manual's 13-field JSON. Any error is one line that names the file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from brlite.config.manual_json import load_manual_config
from brlite.config.options import Config
from brlite.config.validation import make_config
from brlite.errors import ConfigError
from brlite.files.text_file import TextError
from brlite.files.text_file import read_text as read_text_file


def read_text(path: Path) -> str:
    """The text of a config file. Raises `ConfigError` if the file does not exist or is not UTF-8."""
    try:
        return read_text_file(path)
    except TextError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def read_toml(path: Path) -> dict[str, Any]:
    """The data of a TOML file, not checked yet. Raises `ConfigError` if it is not TOML."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        data: dict[str, Any] = tomllib.loads(read_text(path))
    except ValueError as error:  # also for a number of 5,000 digits
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid TOML: nested too deeply") from None
    return data


def load_config(path: Path) -> Config:
    """Read a `.toml` or the manual's `.json`. Raises a one-line `ConfigError`: file, field, value, allowed values."""
    if path.suffix == ".toml":
        return make_config(read_toml(path), source=str(path))
    if path.suffix == ".json":
        return load_manual_config(read_text(path), path)
    raise ConfigError(f"{path}: a config file ends in .toml or .json")
