"""`brlite completion`: prints the script with which bash or zsh completes commands and flags, made from the parser."""

from __future__ import annotations

import argparse

from brlite.commands.arguments import file_path
from brlite.commands.cli import command_parser


def run(args: argparse.Namespace) -> int:
    print(completion_script(command_parser(), args.shell))
    return 0


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script with which bash or zsh completes the parser's commands."""
    import shtab

    _complete_paths(parser, shtab.FILE)
    return str(shtab.complete(parser, shell))


def _complete_paths(parser: argparse.ArgumentParser, file: object) -> None:
    """Let the shell complete file names for each argument, also of subcommands, that may be a path."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                _complete_paths(child, file)
        elif action.type is file_path or "FILE" in str(action.metavar) or "PATH" in str(action.metavar):
            action.complete = file  # type: ignore[attr-defined]
