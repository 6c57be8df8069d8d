"""The home folder, and brlite's cache folder for downloads and built files. Creates nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def expand_home(path: str | Path) -> Path:
    """`path` with the home folder in place of a leading `~`.

    Raises `OSError` if there is no home folder: HOME is not set, and the system does not know the user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise OSError(errno.ENOENT, f"{error} Set HOME or BRLITE_CACHE", str(path)) from None


def default_cache() -> Path:
    """brlite's cache folder: BRLITE_CACHE, else brlite in XDG_CACHE_HOME, else ~/.cache/brlite.

    Raises `OSError` as `expand_home` does.
    """
    if own := os.environ.get("BRLITE_CACHE"):
        return expand_home(own)
    return expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "brlite"
