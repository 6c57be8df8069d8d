"""`brlite pull`: fetch a model by its name, or bring it up to date. Loads nothing."""

from __future__ import annotations

import argparse
import sys

from brlite.errors import ModelError
from brlite.files.quoting import shown


def add_pull(parser: argparse.ArgumentParser) -> None:
    about = "organisation/model[:QUANT][@revision]; modelscope: before it is that hub (docs/models.md)"
    parser.add_argument("name", metavar="NAME", help=about)
    parser.set_defaults(logs_from="warning")


def pull(args: argparse.Namespace) -> int:
    """Ask the hub for the newest files and fetch those that are missing; print where the model is.

    A hub that cannot be asked is no failure if the model is here. Raises `ModelError` if it is nowhere.
    """
    from brlite.checkpoint.fetch import local_sources, locate_model, progress_bar, remote_sources

    try:
        with progress_bar() as show:
            found = locate_model(args.name, None, show, sources=remote_sources)
    except ModelError as error:
        try:
            found = locate_model(args.name, None, sources=local_sources)
        except ModelError:
            raise error from None
        print(f"brlite: not brought up to date: {shown(str(error))}", file=sys.stderr)
    print(found)
    return 0
