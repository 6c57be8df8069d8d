"""The three standard streams at the start of a command: all of them there, and able to show any character."""

from __future__ import annotations

import io
import os
import sys

SHOWN_INSTEAD = "backslashreplace"  # in JSON such an escape is one of JSON's own


def open_closed_streams() -> None:
    """Put /dev/null in the place of each standard stream that is closed.

    Else the next file or socket gets its number, and what is printed goes there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def show_all_text() -> None:
    """Output for eyes: what the terminal's encoding lacks is shown as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=SHOWN_INSTEAD)


def print_data() -> None:
    """Output for programs: it is UTF-8 whatever the locale says."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors=SHOWN_INSTEAD)
