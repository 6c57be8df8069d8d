"""What torch's path does on a card. `--check` first: whether it is right there, in some ninety seconds.

    python bench/card.py --check                          # on the first card that torch finds
    python bench/card.py --check --model FILE.gguf        # with a real model as well
    python bench/card.py --check --device cpu --short     # for CI, which has no card

Exit status: 0, or 1 if a check failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import card_check


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    return card_check.run_checks(args)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", required=True, help="compare with the CPU, measure nothing")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, supa, or cpu to try the script itself (cuda)")
    parser.add_argument("--model", type=Path, metavar="FILE", help="a folder or .gguf file to check with as well")
    parser.add_argument("--only", type=_words, default=[], metavar="LIST", help=f"of {', '.join(card_check.NAMES)}")
    parser.add_argument("--time-limit", type=float, default=150, metavar="SECONDS", help="of all checks (150)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found to FILE")
    parser.add_argument("--short", action="store_true", help="one architecture of each family, no speeds")
    args = parser.parse_args(argv)
    if unknown := set(args.only) - set(card_check.NAMES):
        parser.error(f"--only: {', '.join(sorted(unknown))} unknown; allowed are {', '.join(card_check.NAMES)}")
    return args


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


if __name__ == "__main__":
    sys.exit(main())
