"""Where every command begins: `python -m brlite` and the console scripts."""

from __future__ import annotations

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run `brlite …` and end the process with its status."""
    _run("main")


def br_api_server() -> NoReturn:
    """Run the manual's command `br_api_server`."""
    _run("br_api_server")


def model_convert() -> NoReturn:
    """Run the manual's command `model_convert`."""
    _run("model_convert")


def _run(name: str) -> NoReturn:
    """Import the command line and run it. Ctrl-C while the command is imported ends the process without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else the parent has it ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from brlite.commands import cli

    try:
        status = getattr(cli, name)()
    except KeyboardInterrupt:  # before the command's own handling of it
        status = cli.EXIT_INTERRUPTED
    cli.end_process(status)


if __name__ == "__main__":
    main()
