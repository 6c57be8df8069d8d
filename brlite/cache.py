"""Where brlite keeps what it has fetched and built. Knows nothing of what that is; creates nothing."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """brlite's cache folder: BRLITE_CACHE, else brlite in XDG_CACHE_HOME, else ~/.cache/brlite."""
    if own := os.environ.get("BRLITE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "brlite"
