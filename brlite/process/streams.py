"""The standard streams of a command: opened if they are closed, able to show any character, and the log on stderr."""

from __future__ import annotations

import io
import logging
import os
import sys

SHOWN_INSTEAD = "backslashreplace"  # in JSON, the escape of a lone surrogate is a valid JSON escape
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
LIBRARIES = ("httpx", "httpcore", "huggingface_hub", "urllib3", "filelock")  # they log every request


def open_closed_streams() -> None:
    """Open /dev/null for each standard stream that is closed, here and in child processes.

    Otherwise the next file or socket would get its number, and printed text would be written there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened == number:
                os.set_inheritable(number, True)
            else:
                os.dup2(opened, number)
                os.close(opened)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def show_all_text() -> None:
    """For output that people read: show characters that the terminal's encoding lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=SHOWN_INSTEAD)


def print_data() -> None:
    """For output that programs read: write UTF-8, whatever the locale is."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors=SHOWN_INSTEAD)


def configure_logging(level: str) -> None:
    """Log to standard error from `level` on. The libraries' messages about each request need `debug`."""
    logging.basicConfig(level=level.upper(), handlers=[BarAwareHandler(sys.stderr)], format=LOG_FORMAT)
    if level != "debug":
        for name in LIBRARIES:
            logging.getLogger(name).setLevel(logging.WARNING)


class BarAwareHandler(logging.StreamHandler):  # type: ignore[type-arg]  # in Python 3.10 it takes none
    """Removes tqdm's progress bars from the terminal while it writes a line, and draws them again below it."""

    def emit(self, record: logging.LogRecord) -> None:
        # tqdm is imported with the first bar, perhaps by another thread at this moment; until then there is no bar.
        tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
        if tqdm is None or not getattr(tqdm, "_instances", None):
            super().emit(record)
            return
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)
