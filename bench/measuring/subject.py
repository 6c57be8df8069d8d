"""What is measured: a model, and the config that brlite gets for it. Starts nothing and measures nothing.

A variant of brlite is named by words: `brlite-int8-nospec` has int8 weights and drafts no tokens. What a name leaves
open is the command line's, and else the default.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from msgspec import Struct

from brlite.checkpoint.fetch import locate_model
from brlite.checkpoint.progress import progress_bar
from brlite.config.options import DEFAULT_MODEL, Config
from brlite.config.validation import make_config
from brlite.errors import ConfigError
from brlite.models.precision import PrecisionOption

BRLITE = "brlite"
# Word → table, field and value.
WORDS: dict[str, tuple[str, str, str]] = {
    "auto": ("model", "precision", "auto"),
    "bf16": ("model", "precision", "bf16"),
    "int8": ("model", "precision", "a_bf16_w_int8"),
    "int8kv": ("model", "precision", "a_bf16_w_int8_kv_int8"),
    "native": ("engine", "backend", "native"),
    "torch": ("engine", "backend", "torch"),
    "spec": ("engine", "speculation", "auto"),
    "nospec": ("engine", "speculation", "off"),
}
SPECULATION = {"on": "auto", "off": "off"}

Tables = dict[str, dict[str, object]]


class Model(Struct, frozen=True):
    """A model by the name that requests call it, and where it is."""

    name: str
    path: Path


def find_model(name_or_path: str) -> Model:
    """A `.gguf` file or a folder, or a model that is fetched by its name."""
    path = Path(name_or_path).expanduser()
    if path.exists():
        return Model(path.stem if path.suffix == ".gguf" else path.resolve().name, path.resolve())
    with progress_bar() as show:
        return Model(name_or_path, locate_model(name_or_path, None, show))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--model`, and what a variant's name may leave open."""
    parser.add_argument("--model", default=DEFAULT_MODEL, metavar="NAME|PATH", help="a name, a folder or a .gguf file")
    parser.add_argument("--precision", choices=get_args(PrecisionOption), help="of brlite (default: the config's)")
    parser.add_argument("--backend", choices=("auto", "native", "torch"), help="of brlite (default: the config's)")
    parser.add_argument("--speculation", choices=tuple(SPECULATION), help="of brlite (default: the config's)")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="0: everyone's own default")


def add_turns(parser: argparse.ArgumentParser, short: str) -> None:
    """What the benches have whose servers take turns. `short` tells what `--short` does."""
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(3)")
    parser.add_argument("--start-timeout", type=float, default=300, metavar="SECONDS", help="(300)")
    parser.add_argument("--short", action="store_true", help=short)


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, short: Mapping[str, object]
) -> argparse.Namespace:
    """The arguments, with the values of `short` if it is the short form."""
    args = parser.parse_args(argv)
    if args.short:
        vars(args).update(short)
    return args


def chosen(args: argparse.Namespace) -> Tables:
    """The fields that the command line sets."""
    engine = {"backend": args.backend, "speculation": SPECULATION.get(args.speculation), "threads": args.threads}
    return {
        "engine": {name: value for name, value in engine.items() if value is not None},
        "model": {} if args.precision is None else {"precision": args.precision},
    }


def variant_tables(name: str, defaults: Tables) -> Tables:
    """The fields of a variant: `defaults` and over them what the words of its name say."""
    tables = {title: dict(fields) for title, fields in defaults.items()}
    for word in name.split("-")[1:]:
        table, field, value = WORDS[word]
        tables[table][field] = value
    return tables


def is_variant(name: str) -> bool:
    first, *words = name.split("-")
    return first == BRLITE and all(word in WORDS for word in words)


def engine_config(model: Model, tables: Tables, **fields: object) -> Config:
    """A config for an engine in this process; `fields` are the model's further ones. Ends the bench if it is wrong."""
    spec: Mapping[str, object] = {"name": model.name, "path": str(model.path), **tables["model"], **fields}
    try:
        return make_config({"engine": tables["engine"], "model": [spec]}, source="bench")
    except ConfigError as error:
        sys.exit(str(error))
