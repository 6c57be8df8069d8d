"""Fixtures that several rooms share. Fakes stand in `tests/fakes.py`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the commands do; read when torch loads


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model, fetched once and kept in brlite's cache folder. Mark tests that use it with `model`."""
    from brlite.checkpoint.fetch import locate_model
    from brlite.config import DEFAULT_MODEL

    return locate_model(DEFAULT_MODEL, None)
