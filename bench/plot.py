"""Draws what `serving.py --json` wrote as an SVG: `python bench/plot.py serving.json docs/images/serving.svg`.

A group of bars for each number of streams, a bar for each server: tokens/s, the median over the rounds, and
its share of the first server's rate. Text and colours follow the reader's light or dark theme.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path

from msgspec import Struct

WIDTH, LABEL_WIDTH, VALUE_WIDTH = 720, 150, 110
BAR, GAP, HEAD = 16, 12, 44
STYLE = """\
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .note { fill: #59636e; font-size: 11px }
.first { fill: #0969da } .peer { fill: #afb8c1 }
@media (prefers-color-scheme: dark) { text { fill: #f0f6fc } .note { fill: #9198a1 } .peer { fill: #59636e } }"""


class Bar(Struct, frozen=True):
    """A server's tokens/s under one number of streams, and the first server's number divided by it (None: itself)."""

    streams: int
    server: str
    tokens_per_second: float
    ratio: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("measured", type=Path, help="what serving.py --json wrote")
    parser.add_argument("svg", type=Path)
    args = parser.parse_args()
    measured = json.loads(args.measured.read_text(encoding="utf-8"))
    machine = measured["machine"]
    note = f"{machine['cores']} cores of {machine['processor']}, {machine['date']}. Medians of interleaved rounds."
    args.svg.parent.mkdir(parents=True, exist_ok=True)
    args.svg.write_text(draw(find_bars(measured["cells"]), note), encoding="utf-8")


def find_bars(cells: Sequence[dict[str, object]]) -> list[Bar]:
    """Medians over the rounds, in the order in which servers and numbers of streams first appear."""
    rates: dict[tuple[int, str], dict[int, float]] = {}
    for cell in cells:
        by_round = rates.setdefault((int(str(cell["concurrency"])), str(cell["server"])), {})
        by_round[int(str(cell["round"]))] = float(str(cell["output_tokens_per_second"]))
    first = str(cells[0]["server"])
    bars = []
    for (streams, server), by_round in sorted(rates.items(), key=lambda item: item[0][0]):
        own = rates[streams, first]
        quotients = [own[round_] / rate for round_, rate in by_round.items() if rate and round_ in own]
        ratio = None if server == first or not quotients else statistics.median(quotients)
        bars.append(Bar(streams, server, statistics.median(by_round.values()), ratio))
    return bars


def draw(bars: Sequence[Bar], note: str) -> str:
    """The picture. The longest bar has the whole width between the names and the numbers."""
    scale = (WIDTH - LABEL_WIDTH - VALUE_WIDTH) / max(bar.tokens_per_second for bar in bars)
    shapes, y, streams, first = [], HEAD, 0, bars[0].server
    for bar in bars:
        if bar.streams != streams:
            y += GAP if streams else 0
            streams = bar.streams
            shapes.append(f'<text x="0" y="{y + 12}">{streams} stream{"s" * (streams > 1)}</text>')
            y += BAR + 2
        length = bar.tokens_per_second * scale
        shown = f"{bar.tokens_per_second:.0f}" + (f" ({1 / bar.ratio:.0%})" if bar.ratio else "")
        shapes += [
            f'<text x="{LABEL_WIDTH - 8}" y="{y + 12}" text-anchor="end">{escape(bar.server)}</text>',
            f'<rect class="{"first" if bar.server == first else "peer"}" x="{LABEL_WIDTH}" y="{y}" '
            f'width="{length:.1f}" height="{BAR - 3}" rx="2"/>',
            f'<text x="{LABEL_WIDTH + length + 6:.1f}" y="{y + 12}">{shown}</text>',
        ]
        y += BAR
    height = y + 26
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}">',
            f"<style>{STYLE}</style>",
            '<text x="0" y="16">Generated tokens/s of all streams; longer is better</text>',
            f'<text class="note" x="0" y="33">{escape(note)}</text>',
            *shapes,
            f'<text class="note" x="0" y="{height - 6}">In brackets: the share of {escape(first)}\'s rate.</text>',
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    main()
