"""Where every command begins: `python -m brlite` and the console scripts."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Run `brlite …`."""
    return _run("main")


def br_api_server() -> int:
    """Run the manual's command `br_api_server`."""
    return _run("br_api_server")


def model_convert() -> int:
    """Run the manual's command `model_convert`."""
    return _run("model_convert")


def _run(name: str) -> int:
    """Import the command line and run it. Ctrl-C during the import ends the process without a traceback."""
    is_pythons = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else the parent has it ignored
    if is_pythons:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from brlite.commands import cli

    if is_pythons:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status: int = getattr(cli, name)()
    return status


if __name__ == "__main__":
    sys.exit(main())
