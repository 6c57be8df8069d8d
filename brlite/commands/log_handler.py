"""A log handler for standard error that writes above a progress bar, not into its line."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class BarAwareHandler(logging.StreamHandler[TextIO]):
    """Takes tqdm's bars off the terminal while it writes, and puts them back."""

    def emit(self, record: logging.LogRecord) -> None:
        # Imported with the first bar, perhaps by another thread at this moment; before there is none to take off.
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if tqdm is None or not getattr(tqdm, "_instances", None):
            super().emit(record)
            return
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def configure_logging(level: str) -> None:
    """Log from `level` on to standard error. What other libraries say of each request is for `debug` only."""
    handler = BarAwareHandler(sys.stderr)
    logging.basicConfig(level=level.upper(), handlers=[handler], format=FORMAT)
    if level != "debug":
        for name in ("httpx", "httpcore", "huggingface_hub", "urllib3", "filelock"):
            logging.getLogger(name).setLevel(logging.WARNING)
