"""Reads a config file: TOML, or the manual's 13-field JSON."""

from __future__ import annotations

import sys
from pathlib import Path

from brlite.errors import ConfigError

if sys.version_info >= (3, 11):
    pass
else:
    pass
from brlite.config.files import read_toml
from brlite.config.manual_json import load_seed_config
from brlite.config.options import Config
from brlite.config.validation import make_config


def load_config(path: Path) -> Config:
    """Read a `.toml` or the manual's `.json`. Raises a one-line `ConfigError` naming file, field, value and allowed."""
    if path.suffix == ".toml":
        return make_config(read_toml(path), source=str(path))
    if path.suffix == ".json":
        return load_seed_config(path)
    raise ConfigError(f"{path}: a config file ends in .toml or .json")
