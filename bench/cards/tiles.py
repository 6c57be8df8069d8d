"""`card.py --tiles`: how long products take in each of some tiles, at the row counts of decode steps.

The fastest of each belong in the table `TILES` of `backends/torch/triton/multiply.py`. Tiles change no bits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from cards import limits, models

ROWS = (1, 16, 32, 64, 96, 128, 192, 256)
READ_BYTES = 2**28  # copies of a matrix take turns, so that it is read from memory and not from a cache


class Product(NamedTuple):
    """A matrix of a shape, and whether it is gate and up in one."""

    name: str
    num_outputs: int
    num_inputs: int
    is_gated: bool = False


def products(shape: str) -> list[Product]:
    config = models.model_config(shape)
    hidden, size = config.hidden_size, config.intermediate_size
    heads = config.num_heads * config.head_dim
    return [
        Product("qkv", heads + 2 * config.num_kv_heads * config.head_dim, hidden),
        Product("o", hidden, heads),
        Product("gate_up", 2 * size, hidden, is_gated=True),
        Product("down", hidden, size),
    ]


def run(args: argparse.Namespace) -> int:
    """Print a line for each product and number of rows. Exit status 1 if a product could not be computed at all."""
    device = torch.device(args.device)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
    rows = (1, 33) if args.short else ROWS
    machine, found = limits.describe(device), list[dict[str, Any]]()
    forms = [
        form
        for precision in args.precisions
        for form in (("bfloat16",) if precision == "bf16" else ("int8", "int4_zero"))
    ]
    deadline = time.monotonic() + args.time_limit
    for num_rows, shape, form in itertools.product(rows, args.shapes, forms):
        for product in products(shape):
            if time.monotonic() > deadline:
                print("the time is up", flush=True)
                return 0
            times = dict(sorted(_times(product, form, num_rows, device), key=lambda pair: pair[1]))
            best = ", ".join(f"{name} {1e6 * seconds:.0f} us" for name, seconds in itertools.islice(times.items(), 4))
            print(f"{shape} {form} {product.name} {num_rows} rows: {best or 'FAILED'}", flush=True)
            fields = {"shape": shape, "form": form, "product": product.name, "rows": num_rows}
            found.append({**fields, "seconds": times})
            if args.json is not None:
                args.json.write_text(json.dumps({"machine": machine, "tiles": found}, indent=1) + "\n")
    return 0 if all(each["seconds"] for each in found) else 1


def _times(product: Product, form: str, num_rows: int, device: torch.device) -> Iterator[tuple[str, float]]:
    """Each tile that the card takes, and whether the inputs are split, with its seconds; the one in use is marked."""
    from brlite.backends.torch.parameters import GroupedLinear, Linear
    from brlite.backends.torch.triton import multiply as kernels

    weight = torch.empty((product.num_outputs, product.num_inputs), device=device, dtype=torch.bfloat16).normal_()
    linear = Linear(weight)
    if form == "int4_zero":
        codes = torch.empty((product.num_outputs, product.num_inputs // 2), device=device, dtype=torch.uint8).random_()
        scales = torch.full((product.num_outputs, product.num_inputs // 32, 2), 0.01, device=device).half()
        linear = GroupedLinear(codes, form="int4_zero", scales=scales)
    elif form == "int8":
        scales = torch.full((product.num_outputs, product.num_inputs // 32), 0.01, device=device).bfloat16().float()
        levels = torch.empty_like(weight, dtype=torch.int8).random_(-127, 128)
        linear = GroupedLinear(levels, form="int8", scales=scales)
    first = kernels.Matrix.of(linear, product.num_inputs)
    copies = READ_BYTES // first.values.nbytes if device.type != "cpu" else 0
    matrices = [first, *(replace(first, values=first.values.clone()) for _ in range(copies))]
    x = torch.randn((num_rows, product.num_inputs), device=device).bfloat16()
    used = kernels.choose_tile(num_rows, matrices[0], is_gated=product.is_gated)
    sizes = itertools.product((64, 128), (16, 32, 64, 128, 256), (64, 128), (3, 4), (4, 8))
    few = itertools.product((32,), (16,), (128, 256), (3, 4), (2, 4))  # more programs, for int8 at one row
    wanted = [each for each in (*sizes, *few) if num_rows / 2 < each[1] <= max(16, 2 * num_rows)]
    parts = 1 if product.is_gated else kernels.num_parts(product.num_outputs, product.num_inputs)
    segment = kernels.segment_size(product.num_inputs, parts)
    tiles = {used, *(kernels.Tile(*each) for each in wanted if segment % each[2] == 0)}
    for tile in {used} if device.type == "cpu" else tiles:
        for is_split in (False,) if product.is_gated else (False, True):

            def compute(tile: Any = tile, is_split: bool = is_split) -> None:
                for matrix in matrices:
                    if product.is_gated:
                        kernels.multiply_gated(x, matrix, tile)
                    else:
                        kernels.multiply_in_tiles(x, matrix, tile, is_split=is_split)

            name = f"{'x'.join(map(str, tile))}{' split' * is_split}{' (in use)' * (tile == used)}"
            try:
                seconds = (
                    _seconds_captured(compute) if device.type == "cuda" else limits.seconds_of(compute, device, 1, 0)
                )
                yield name, seconds / len(matrices)
            except Exception:  # too much shared memory, too many registers: not for this card
                continue


def _seconds_captured(work: Callable[[], None]) -> float:
    """Of a graph of the work: launches from the host would take longer than some of the products."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(work, rep=5, return_mode="median")) / 1e3
