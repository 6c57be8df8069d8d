"""Fixtures that several rooms share. Fakes stand in `tests/fakes.py`."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model, fetched once and kept in brlite's cache folder. Mark tests that use it with `model`."""
    from brlite.checkpoint.fetch import locate_model
    from brlite.config import DEFAULT_MODEL

    return locate_model(DEFAULT_MODEL, None)
