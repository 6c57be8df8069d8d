"""Where brlite keeps what it has fetched and built. Knows nothing of what that is; creates nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def default_cache() -> Path:
    """brlite's cache folder: BRLITE_CACHE, else brlite in XDG_CACHE_HOME, else ~/.cache/brlite.

    Raises `OSError` where there is no home folder: HOME is not set, and the user is not one of the system's.
    """
    try:
        if own := os.environ.get("BRLITE_CACHE"):
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "brlite"
    except RuntimeError as error:
        raise OSError(errno.ENOENT, f"{error} Set HOME or BRLITE_CACHE", "~") from None
