"""`brlite convert`: makes a bundle of a model. The manual's command `model_convert` has the same arguments.

Flags may be written with hyphens or, as in the manual, with underscores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from brlite.checkpoint.fetch import locate_model
from brlite.checkpoint.model_name import may_be_a_name
from brlite.checkpoint.progress import progress_bar
from brlite.errors import ConfigError


def run(args: argparse.Namespace) -> int:
    from brlite.conversion import convert

    if args.tp != 1:
        raise ConfigError(
            f"--tp {args.tp}: allowed is 1: a bundle serves any, since ranks split the weights themselves"
        )
    folder = located(args.model_dir)
    request = convert.ConversionRequest(args.model_name, folder, args.output_dir, args.precision, args.from_pt)
    return convert.run(request)


def located(path: Path) -> Path:
    """`path`. For the name of a model: the path of that model, which is downloaded if necessary.

    Raises `ModelError`.
    """
    if path.exists() or not may_be_a_name(str(path)):
        return path
    with progress_bar() as show:
        return locate_model(str(path), None, show)
