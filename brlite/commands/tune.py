"""`brlite tune`: computes which precision, context and batch of a model suit this machine. Loads nothing."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import msgspec

from brlite.backends.sizes import Sizes, find_model, known_sizes
from brlite.config.options import DEFAULT_MODEL, Config, EngineConfig, ModelSpec
from brlite.config.validation import model_override, override
from brlite.errors import ConfigError, ModelError
from brlite.models.precision import NATIVE_ONLY, PrecisionOption
from brlite.process.machine import find_cpus, find_memory, show_bytes

SHARE = 0.8  # of the free memory: the rest is for requests, the tokenizer and other programs
BATCHES = (32, 16, 8, 4, 2, 1)
TYPICAL_CONTEXT = 8192  # tokens of a long chat; the batch is computed for this length


class Advice(NamedTuple):
    """How a model would be served in one precision. `context` is 0 if not even one sequence fits."""

    precision: str
    weight_bytes: int
    kv_bytes_per_token: int
    context: int
    batch: int


def run(args: argparse.Namespace) -> int:
    """Print a table of the precisions, and lines for a TOML, for the card that computes, else for the machine's memory.

    Raises `ModelError` if the model is not here or does not fit.
    """
    spec = override(Config(), model_override(args.model)).model[0]
    if find_model(spec) is None and spec.name != DEFAULT_MODEL:
        raise ModelError(f"{args.model} is not on this machine; `brlite pull {args.model}` fetches it")

    sizes_of = find_sizes(spec)
    on_card = sizes_of["bf16"].free_bytes
    free = find_memory().available if on_card is None else on_card
    room = int(free * SHARE)
    rows = [advise(precision, sizes, room) for precision, sizes in sizes_of.items()]
    if rows[0].weight_bytes == rows[1].weight_bytes:
        del rows[0]  # the files are not quantized: it is bf16
    best = choose(rows)
    if on_card is not None:
        print(f"{show_bytes(free)} of the card's memory are free\n")
    else:
        unreported = " (that of the card is not reported)" if sizes_of["bf16"].is_on_card else ""
        threads = f"{find_cpus().num_threads} threads can compute"
        print(f"{show_bytes(free)} of the machine's memory are free{unreported}, {threads}\n")
    print(f"{'precision':24} {'weights':>8} {'KV a token':>11} {'context':>8} {'batch':>6}")
    for row in rows:
        weights, kv = show_bytes(row.weight_bytes), show_bytes(row.kv_bytes_per_token)
        fits = f"{row.context:>8} {row.batch:>6}" if row.context else "  does not fit"
        print(f"{row.precision:24} {weights:>8} {kv:>11} {fits}{'  <- advised' if row is best else ''}")
    if best is None:
        raise ModelError(f"{spec.name} does not fit into {show_bytes(room)}, {SHARE:.0%} of what is free")
    print(f"\n[[model]]\nname = {json.dumps(spec.name, ensure_ascii=False)}")
    if spec.path is not None:
        path = str(Path(spec.path).absolute()) if Path(spec.path).exists() else spec.path
        print(f"path = {json.dumps(path, ensure_ascii=False)}")
    print(f'precision = "{best.precision}"\nbuild_seq = {best.context}\nbuild_batch = {best.batch}')
    return 0


def find_sizes(spec: ModelSpec) -> dict[str, Sizes]:
    """The sizes of a model for one sequence, in each precision that can be computed here. The model is here."""
    found: dict[str, Sizes] = {}
    for precision in get_args(PrecisionOption):
        alone = msgspec.structs.replace(spec, precision=precision, build_batch=1)
        try:
            sizes = known_sizes(alone, EngineConfig())
        except ConfigError:
            if precision in NATIVE_ONLY:
                continue
            raise
        assert sizes is not None  # the model is here, or the default one
        found[precision] = sizes
    return found


def advise(precision: str, sizes: Sizes, room: int) -> Advice:
    """The longest context of one sequence in `room` bytes, and how many sequences of a usual length fit."""
    left = room - sizes.weight_bytes - sizes.graph_bytes
    tokens = max(0, left // sizes.kv_bytes_per_token) // sizes.block_size * sizes.block_size
    context = min(sizes.max_context, tokens)
    usual = max(1, min(TYPICAL_CONTEXT, context))
    batch = next((batch for batch in BATCHES if batch * usual <= tokens), 1)
    # build_seq reserves a whole context for each of the `batch` sequences.
    context = min(context, tokens // batch // sizes.block_size * sizes.block_size)
    return Advice(precision, sizes.weight_bytes, sizes.kv_bytes_per_token, context, batch)


def choose(rows: Sequence[Advice]) -> Advice | None:
    """The row to recommend, None if none fits. A coarser precision wins only by a longer context or a larger batch.

    Rounding to 4 bits costs most: it is for models that do not fit otherwise.
    """
    fitting = [row for row in rows if row.context]
    fitting = [row for row in fitting if row.precision != "a_bf16_w_int4"] or fitting
    return max(fitting, key=lambda row: (min(row.context, TYPICAL_CONTEXT), row.batch, -rows.index(row)), default=None)
