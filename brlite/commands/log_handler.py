"""A log handler for standard error that writes above a progress bar, not into its line."""

from __future__ import annotations

import logging
import sys
from typing import TextIO

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class BarAwareHandler(logging.StreamHandler[TextIO]):
    """Takes tqdm's bars off the terminal while it writes, and puts them back."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")  # imported with the first bar; before there is none to take off
        if tqdm is None or not getattr(tqdm.tqdm, "_instances", None):
            super().emit(record)
            return
        with tqdm.tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def configure_logging(level: str) -> None:
    """Log from `level` on to standard error. What other libraries say of each request is for `debug` only."""
    handler = BarAwareHandler(sys.stderr)
    logging.basicConfig(level=level.upper(), handlers=[handler], format=FORMAT)
    if level != "debug":
        for name in ("httpx", "httpcore", "huggingface_hub", "urllib3", "filelock"):
            logging.getLogger(name).setLevel(logging.WARNING)
