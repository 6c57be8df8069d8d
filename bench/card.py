"""What torch's path does on a card: whether it is right there (`--check`, some ninety seconds), and how fast it is.

    python bench/card.py --check                              # on the first card that torch finds
    python bench/card.py --check --model FILE.gguf            # with a real model as well
    python bench/card.py --check --only schedules --schedules 10000 --time-limit 500   # equal bits in any company
    python bench/card.py                                      # 8B and 1B shapes, bf16 and int8, against transformers
    python bench/card.py --shapes 8b --precisions bf16 --no-peers
    python bench/card.py --first DIR                          # on a new card: all that matters, in a quarter of an hour
    python bench/card.py --profile --shapes 8b                # where the time of decode steps goes, by kernel
    python bench/card.py --check --short                      # on the CPU, for CI: it has no card
    python bench/card.py --short --no-peers
    python bench/card.py --first DIR --short

`--first` runs, each in a process with a time limit: the checks, 2,000 random schedules, the speed of the 8B shape, its
profile, the tiles of its products, and the 1B shape beside transformers. DIR gets a JSON file and the output of each.

Not yet run on a card, in the order of what is most worth knowing: the kernels with helpers, and windows whose hidden
positions are not loaded (`--check`); 10,000 schedules; steps of 1 to 64 rows since the host does less for each row; the
tile of 4-bit gate and up in use, and tiles of 32 outputs for int8 at 1 row (`--tiles --precisions a_bf16_w_int8`);
the bytes that graphs take (the start's log) against `graph_memory.py`, which assumes `DRIVER_BYTES` for each.

Exit status: 0, or 1 if a check failed or a number could not be had.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from cards import check, first, models, speed, tiles

from brlite.models.precision import PrecisionName


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    if args.first is not None:
        return first.run(args)
    if args.profile:
        return first.run_profile(args)
    if args.tiles:
        return tiles.run(args)
    return check.run_checks(args) if args.check else speed.run(args)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda, cuda:1, supa, or cpu to try the script itself (cuda; with --short cpu)")
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="of all checks (150), numbers (400), or --first (780)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found to FILE")
    parser.add_argument("--short", action="store_true", help="tiny shapes, a few steps; checks of a few architectures")
    parser.add_argument("--first", type=Path, metavar="DIR", help="checks, schedules, speed, profile and tiles in turn")
    checks = parser.add_argument_group("checks")
    checks.add_argument("--check", action="store_true", help="compare with the CPU, measure no steps")
    checks.add_argument("--model", type=Path, metavar="FILE", help="a folder or .gguf file to check with as well")
    checks.add_argument("--only", type=_words, default=[], metavar="LIST", help=f"of {', '.join(check.NAMES)}")
    checks.add_argument("--schedules", type=int, metavar="N", help="random schedules in each precision (300)")
    speeds = parser.add_argument_group("numbers")
    speeds.add_argument("--shapes", type=_words, default=["8b", "1b"], metavar="LIST", help="(8b,1b)")
    speeds.add_argument("--precisions", type=_words, default=["bf16", "a_bf16_w_int8"], metavar="LIST")
    speeds.add_argument("--kernels", type=_words, default=[], metavar="LIST", help="triton, eager (both, triton first)")
    speeds.add_argument("--no-peers", dest="peers", action="store_false", help="without transformers and vLLM")
    speeds.add_argument("--tiles", action="store_true", help="only products, in each of some tiles")
    speeds.add_argument("--profile", action="store_true", help="only where the time of decode steps goes")
    args = parser.parse_args(argv)
    if args.short:
        args.shapes = ["tiny"]
    args.schedules = args.schedules or (3 if args.short else 300)
    args.device = args.device or ("cpu" if args.short else "cuda")
    args.kernels = args.kernels or (["eager"] if args.device == "cpu" else [])
    args.time_limit = args.time_limit or (150.0 if args.check else 400.0 if args.first is None else 780.0)
    known = {"only": check.NAMES, "shapes": models.SHAPES, "precisions": get_args(PrecisionName)}
    for option, allowed in known.items():
        if unknown := set(getattr(args, option)) - set(allowed):
            parser.error(f"--{option}: {', '.join(sorted(unknown))} unknown; allowed are {', '.join(allowed)}")
    return args


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


if __name__ == "__main__":
    sys.exit(main())
