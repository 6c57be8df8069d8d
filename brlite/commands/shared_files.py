"""Makes the files that a wheel puts into share/, from the commands' parsers: the man page and the shells' completions.

The build has setuptools, argparse-manpage and shtab, but none of the other packages that brlite needs when it runs.
"""

from __future__ import annotations

import logging
from pathlib import Path

from setuptools.command.build import build

import brlite
from brlite.commands.cli import command_parser
from brlite.commands.completion import completion_script

logger = logging.getLogger(__name__)


def man_page() -> str:
    """`brlite(1)` in roff. Raises ImportError without argparse-manpage."""
    from argparse_manpage.manpage import Manpage

    parser = command_parser()
    page = Manpage(parser)
    page.source, page.manual, page.description = f"brlite {brlite.__version__}", "Commands", parser.description
    return str(page)


class BuildWithSharedFiles(build):
    """`build`, which also makes the files; a wheel then contains them, an editable install does not."""

    def run(self) -> None:
        super().run()
        try:
            files = {
                "share/man/man1/brlite.1": man_page(),
                "share/bash-completion/completions/brlite": completion_script(command_parser(), "bash"),
                "share/zsh/site-functions/_brlite": completion_script(command_parser(), "zsh"),
            }
        except ImportError as error:
            logger.warning("brlite is built without man page and completions: %s", error)
            return
        self.distribution.data_files = []
        for name, text in files.items():
            path = Path(self.build_temp, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            self.distribution.data_files.append((str(Path(name).parent), [str(path)]))
