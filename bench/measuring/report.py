"""From loads to numbers: one `Cell` for each server, concurrency and round, their medians, and ratios between servers.

Renders Markdown with the ratios first. Knows how nothing was started or sent.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from measuring.load import Answer, Load
from measuring.memory import Memory
from msgspec import Struct

T = TypeVar("T")

MISSING = "–"


class Cell(Struct, frozen=True, kw_only=True):
    """One load on one server. Times are in seconds, memory in bytes; failed requests count in `num_errors` only."""

    server: str
    concurrency: int
    round: int
    seconds: float
    num_requests: int
    num_errors: int
    first_error: str | None
    num_short: int
    prompt_tokens: int | None
    output_tokens: int
    is_counted_by_usage: bool
    output_tokens_per_second: float
    requests_per_second: float
    ttft_p50: float | None
    ttft_p99: float | None
    itl_p50: float | None
    itl_p99: float | None
    memory_last: int | None
    memory_peak: int | None
    lag_p99: float | None = None


class Ratio(Struct, frozen=True, kw_only=True):
    """The first server's number divided by a peer's: the median over the rounds of each round's quotient."""

    peer: str
    concurrency: int
    metric: str
    ratio: float


Field = Callable[[Cell], "float | None"]

# Title, the cell's number, how it is shown.
_METRICS: dict[str, tuple[Field, Callable[[float], str]]] = {
    "tokens/s": (lambda cell: cell.output_tokens_per_second or None, lambda value: f"{value:.1f}"),
    "requests/s": (lambda cell: cell.requests_per_second or None, lambda value: f"{value:.2f}"),
    "TTFT p50": (lambda cell: cell.ttft_p50, lambda value: f"{value * 1000:.0f} ms"),
    "TTFT p99": (lambda cell: cell.ttft_p99, lambda value: f"{value * 1000:.0f} ms"),
    "ITL p50": (lambda cell: cell.itl_p50, lambda value: f"{value * 1000:.1f} ms"),
    "ITL p99": (lambda cell: cell.itl_p99, lambda value: f"{value * 1000:.1f} ms"),
    "memory": (lambda cell: cell.memory_last, lambda value: f"{value / 1e6:.0f} MB"),
    "peak memory": (lambda cell: cell.memory_peak, lambda value: f"{value / 1e6:.0f} MB"),
    "lag p99": (lambda cell: cell.lag_p99, lambda value: f"{value * 1000:.1f} ms"),
}
_COMPARED = ("tokens/s", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "peak memory")


def make_cell(server: str, concurrency: int, round_: int, load: Load, max_tokens: int, memory: Memory | None) -> Cell:
    """Count a load. Tokens are what the server's `usage` says; without one, chunks with text are counted."""
    good = [answer for answer in load.answers if answer.error is None]
    errors = [answer.error for answer in load.answers if answer.error is not None]
    counts = [_num_tokens(answer) for answer in good]
    prompts = [answer.prompt_tokens for answer in good if answer.prompt_tokens is not None]
    ttfts = [answer.text_times[0] - answer.sent_at for answer in good if answer.text_times]
    itls = [later - earlier for answer in good for earlier, later in itertools.pairwise(answer.text_times)]
    return Cell(
        server=server,
        concurrency=concurrency,
        round=round_,
        seconds=load.seconds,
        num_requests=len(load.answers),
        num_errors=len(errors),
        first_error=errors[0] if errors else None,
        num_short=sum(count < max_tokens for count in counts),
        prompt_tokens=sum(prompts) if len(prompts) == len(good) else None,
        output_tokens=sum(counts),
        is_counted_by_usage=all(answer.completion_tokens is not None for answer in good),
        output_tokens_per_second=sum(counts) / load.seconds,
        requests_per_second=len(good) / load.seconds,
        ttft_p50=percentile(ttfts, 50),
        ttft_p99=percentile(ttfts, 99),
        itl_p50=percentile(itls, 50),
        itl_p99=percentile(itls, 99),
        memory_last=memory.resident if memory else None,
        memory_peak=memory.peak if memory else None,
        lag_p99=percentile(load.lags, 99),
    )


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The value that `percent` of them do not exceed, between neighbours by proportion; `None` of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def find_ratios(cells: Sequence[Cell]) -> list[Ratio]:
    """The first server's numbers to every other's, round by round, so that what slows both does not count."""
    first, *peers = _unique(cell.server for cell in cells)
    return [
        Ratio(peer=peer, concurrency=concurrency, metric=metric, ratio=ratio)
        for concurrency in _unique(cell.concurrency for cell in cells)
        for peer in peers
        for metric in _COMPARED
        if (ratio := _ratio(_select(cells, first, concurrency), _select(cells, peer, concurrency), metric)) is not None
    ]


def render(cells: Sequence[Cell]) -> str:
    """Markdown: ratios if there are peers, then each server's medians, then what is to be known about them."""
    tables = [_measured_table(cells)]
    if ratios := find_ratios(cells):
        tables.insert(0, _ratio_table(cells[0].server, ratios, cells))
    if notes := find_notes(cells):
        tables.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(tables)


def find_notes(cells: Sequence[Cell]) -> list[str]:
    """What makes numbers less comparable than they look."""
    notes = []
    for server in _unique(cell.server for cell in cells):
        own = [cell for cell in cells if cell.server == server]
        if errors := sum(cell.num_errors for cell in own):
            notes.append(f"{server}: {errors} requests failed, e.g. {next(c.first_error for c in own if c.num_errors)}")
        if short := sum(cell.num_short for cell in own):
            notes.append(f"{server}: {short} answers were shorter than asked for")
        if not all(cell.is_counted_by_usage for cell in own):
            notes.append(f"{server}: sends no usage, so its tokens are chunks with text")
    counts: dict[tuple[int, int], set[int | None]] = {}
    for cell in cells:
        if not cell.num_errors:
            counts.setdefault((cell.concurrency, cell.round), set()).add(cell.prompt_tokens)
    if any(len(each) > 1 for each in counts.values()):
        notes.append("the servers counted different numbers of prompt tokens")
    return notes


def _num_tokens(answer: Answer) -> int:
    return len(answer.text_times) if answer.completion_tokens is None else answer.completion_tokens


def _ratio(own: Sequence[Cell], peer: Sequence[Cell], metric: str) -> float | None:
    field, _ = _METRICS[metric]
    by_round = {cell.round: field(cell) for cell in peer}
    quotients = [
        mine / theirs for cell in own if (mine := field(cell)) is not None and (theirs := by_round.get(cell.round))
    ]
    return statistics.median(quotients) if quotients else None


def _ratio_table(first: str, ratios: Sequence[Ratio], cells: Sequence[Cell]) -> str:
    rows = []
    for concurrency, peer in _unique((ratio.concurrency, ratio.peer) for ratio in ratios):
        found = {
            ratio.metric: f"{ratio.ratio:.2f}x"
            for ratio in ratios
            if (ratio.concurrency, ratio.peer) == (concurrency, peer)
        }
        rows.append([str(concurrency), f"{first} / {peer}", *(found.get(metric, MISSING) for metric in _COMPARED)])
    num_rounds = len({cell.round for cell in cells})
    title = f"Ratios, medians over the rounds ({num_rounds}): tokens/s better above 1, the rest better below 1."
    return title + "\n\n" + _table(["streams", "ratio", *_COMPARED], rows)


def _measured_table(cells: Sequence[Cell]) -> str:
    rows = []
    for concurrency in _unique(cell.concurrency for cell in cells):
        for server in _unique(cell.server for cell in cells):
            own = _select(cells, server, concurrency)
            medians = [_median(own, *metric) for metric in _METRICS.values()]
            errors = sum(cell.num_errors for cell in own)
            requests = sum(cell.num_requests for cell in own)
            rows.append([str(concurrency), server, *medians, f"{errors} of {requests}"])
    return "Measured, medians over the rounds.\n\n" + _table(["streams", "server", *_METRICS, "errors"], rows)


def _median(cells: Sequence[Cell], field: Field, show: Callable[[float], str]) -> str:
    values = [value for cell in cells if (value := field(cell)) is not None]
    return show(statistics.median(values)) if values else MISSING


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---:", "---", *["---:"] * (len(header) - 2)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def _select(cells: Sequence[Cell], server: str, concurrency: int) -> list[Cell]:
    return [cell for cell in cells if (cell.server, cell.concurrency) == (server, concurrency)]


def _unique(values: Iterable[T]) -> list[T]:
    """Each value once, in the order of appearance."""
    return list(dict.fromkeys(values))
