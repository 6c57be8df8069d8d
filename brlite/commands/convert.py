"""The arguments of `brlite convert` and `brlite inspect`, and what they start. `cli.py` runs them as it does others.

Both spellings of a flag are taken, the manual's with underscores and the usual one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from brlite.errors import ConfigError
from brlite.models.precision import PrecisionName


def add_conversion(parser: argparse.ArgumentParser) -> None:
    name = "what requests will call it; the hub's folder names, models--Org--Name, are understood"
    parser.add_argument("--model_name", "--model-name", required=True, metavar="NAME", help=name)
    folder = "its folder or .gguf file, or its name on a hub: config, tokenizer and weights"
    parser.add_argument("--model_dir", "--model-dir", type=Path, required=True, metavar="DIR", help=folder)
    where = "folder in which the bundle's folder is created"
    parser.add_argument("--output_dir", "--output-dir", type=Path, required=True, metavar="OUT", help=where)
    names = get_args(PrecisionName)
    packed = "precision of the bundle's weights (default: %(default)s, as the manual recommends for all its models)"
    parser.add_argument("--precision", choices=names, default=names[-1], help=packed)
    traced = "take the weights from this .pt, traced by the manual's tool; config and tokenizer from --model_dir"
    parser.add_argument("--from-pt", "--from_pt", type=Path, metavar="FILE", help=traced)
    parser.add_argument("--tp", type=int, default=1, help=argparse.SUPPRESS)
    parser.set_defaults(command=convert)


def add_inspection(parser: argparse.ArgumentParser) -> None:
    about = "a traced .pt, a bundle, a Hugging Face folder, a .gguf file, packed weights, or a name on a hub"
    parser.add_argument("path", type=Path, metavar="PATH", help=about)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--verify", action="store_true", help="read a bundle's files and compare their sha256")


def convert(args: argparse.Namespace) -> int:
    from brlite.conversion.convert import ConversionRequest, run

    if args.tp != 1:
        raise ConfigError(
            f"--tp {args.tp}: allowed is 1: a bundle serves any, since ranks split the weights themselves"
        )
    folder = located(args.model_dir)
    return run(ConversionRequest(args.model_name, folder, args.output_dir, args.precision, args.from_pt))


def inspect(args: argparse.Namespace) -> int:
    from brlite.commands.inspect import run

    return run(located(args.path), as_json=args.json, verify=args.verify)


def located(path: Path) -> Path:
    """`path`, or where the model is whose name it is; it is fetched if it is not here. Raises `ModelError`."""
    from brlite.checkpoint.fetch import locate_model, progress_bar
    from brlite.checkpoint.model_name import may_be_a_name

    if path.exists() or not may_be_a_name(str(path)):
        return path
    with progress_bar() as show:
        return locate_model(str(path), None, show)
