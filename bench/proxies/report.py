"""What the loads on the proxies show: the medians of each, ratios between them, and whether the goals are met.

Renders Markdown. Knows how nothing was started or sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Literal

import msgspec
from msgspec import Struct
from proxies.window import Findings, Used
from proxies.works import LARGE, SHORT, SINGLE, STREAMS, Work

MISSING = "–"


class Cell(Struct, frozen=True, kw_only=True):
    """One load on one proxy. `cpu_us` is its processor time for each event of a stream, else for each request.

    `waited_share` of the time it could have run, but others had its core: what they took from its requests/s.
    """

    proxy: str
    work: str
    round: int
    requests_per_second: float
    events_per_second: float
    events_per_read: float | None
    cpu_us: float | None
    core_share: float
    waited_share: float
    latency_p50_us: float
    latency_p99_us: float
    gap_p99_us: float
    memory: int
    errors: int
    altered: int
    reconnects: int
    first_error: str


class Idle(Struct, frozen=True, kw_only=True):
    """The memory that one idle connection took in a proxy that had just been started."""

    proxy: str
    bytes: float


How = Literal["ratio", "difference", "value"]


class Goal(Struct, frozen=True, kw_only=True):
    """A number of brlite's that must reach `limit`: by itself, less a peer's, or divided by it."""

    title: str
    work: str
    field: str
    how: How
    limit: float
    is_most: bool = True
    peer: str = ""
    unit: str = "x"
    scale: float = 1.0


class Verdict(Struct, frozen=True, kw_only=True):
    """A goal and what was found: the median over the rounds; None if it was not measured.

    `by_cpu` is what a ratio of requests/s would be if each proxy had had a whole core to itself.
    """

    goal: Goal
    found: float | None
    by_cpu: float | None = None

    @property
    def holds(self) -> bool | None:
        if self.found is None:
            return None
        return self.found <= self.goal.limit if self.goal.is_most else self.found >= self.goal.limit


IDLE = "idle connections"
_CPU, _RATE, _LATENCY = "cpu_us", "requests_per_second", "latency_p50_us"


def _at_most(title: str, work: str, field: str, peer: str, limit: float) -> Goal:
    return Goal(title=title, work=work, field=field, how="ratio", peer=peer, limit=limit)


def _at_least(title: str, work: str, field: str, peer: str, limit: float) -> Goal:
    return Goal(title=title, work=work, field=field, how="ratio", peer=peer, limit=limit, is_most=False)


GOALS = (
    _at_most("SSE, CPU per event", STREAMS, _CPU, "nginx-tuned", 1.5),
    _at_most("SSE, CPU per event", STREAMS, _CPU, "vllm-router", 0.8),
    _at_most("SSE, CPU per event", STREAMS, _CPU, "sglang-router", 0.8),
    _at_least("short requests/s", SHORT, _RATE, "nginx", 1.5),
    _at_least("short requests/s", SHORT, _RATE, "nginx-tuned", 0.4),
    _at_least("short requests/s", SHORT, _RATE, "vllm-router", 2.5),
    _at_least("short requests/s", SHORT, _RATE, "sglang-router", 2.5),
    Goal(
        title="added latency p50",
        work=SINGLE,
        field=_LATENCY,
        how="difference",
        peer="nginx-tuned",
        limit=60,
        unit=" µs",
    ),
    _at_least("large bodies, requests/s", LARGE, _RATE, "vllm-router", 3),
    Goal(title="memory at the streams", work=STREAMS, field="memory", how="value", limit=50, unit=" MB", scale=1e6),
    Goal(title="idle connection", work=IDLE, field="bytes", how="value", limit=20, unit=" KiB", scale=1024),
)


def make_cell(proxy: str, work: Work, round_: int, findings: Findings, used: Used) -> Cell:
    units = findings.events if work.events else findings.requests
    seconds = max(findings.seconds, 1e-9)  # 0 if nothing worked
    return Cell(
        proxy=proxy,
        work=work.name,
        round=round_,
        requests_per_second=findings.requests / seconds,
        events_per_second=findings.events / seconds,
        events_per_read=findings.events / findings.reads if findings.reads else None,
        cpu_us=used.times.ran / units * 1e6 if units else None,
        core_share=used.times.ran / seconds,
        waited_share=used.times.waited / seconds,
        latency_p50_us=findings.latency_p50_us,
        latency_p99_us=findings.latency_p99_us,
        gap_p99_us=findings.gap_p99_us,
        memory=used.memory,
        errors=findings.errors,
        altered=findings.altered,
        reconnects=findings.reconnects,
        first_error=findings.first_error,
    )


def judge(cells: Sequence[Cell], idles: Sequence[Idle], subject: str) -> list[Verdict]:
    """Every goal for `subject`. Quotients and differences are of the same round, and the median is taken of them."""
    return [
        Verdict(goal=goal, found=_find(goal, cells, idles, subject), by_cpu=_find_by_cpu(goal, cells, subject))
        for goal in GOALS
    ]


def _find_by_cpu(goal: Goal, cells: Sequence[Cell], subject: str) -> float | None:
    if goal.field != _RATE:
        return None
    cost = _find(msgspec.structs.replace(goal, field=_CPU), cells, [], subject)
    return None if cost is None else 1 / cost


def _find(goal: Goal, cells: Sequence[Cell], idles: Sequence[Idle], subject: str) -> float | None:
    if goal.work == IDLE:
        values = [idle.bytes / goal.scale for idle in idles if idle.proxy == subject]
        return median(values) if values else None
    own = _by_round(cells, subject, goal.work, goal.field)
    if goal.how == "value":
        return median(own.values()) / goal.scale if own else None
    peer = _by_round(cells, goal.peer, goal.work, goal.field)
    pairs = [(own[each], peer[each]) for each in own.keys() & peer.keys()]
    if not pairs:
        return None
    if goal.how == "difference":
        return median(mine - theirs for mine, theirs in pairs)
    return median(mine / theirs for mine, theirs in pairs)


def _by_round(cells: Sequence[Cell], proxy: str, work: str, field: str) -> dict[int, float]:
    """The rounds that brought a number other than nothing."""
    return {
        cell.round: value
        for cell in cells
        if (cell.proxy, cell.work) == (proxy, work) and not cell.errors and (value := getattr(cell, field))
    }


_Show = Callable[[float], str]
# Title, field and form of a column, for each work.
_REQUESTS: tuple[tuple[str, str, _Show], ...] = (
    ("requests/s", "requests_per_second", lambda value: f"{value:.0f}"),
    ("CPU µs/request", "cpu_us", lambda value: f"{value:.1f}"),
    ("core", "core_share", lambda value: f"{value:.0%}"),
    ("waited", "waited_share", lambda value: f"{value:.0%}"),
    ("p50 µs", "latency_p50_us", lambda value: f"{value:.0f}"),
    ("p99 µs", "latency_p99_us", lambda value: f"{value:.0f}"),
)
_EVENTS: tuple[tuple[str, str, _Show], ...] = (
    ("events/s", "events_per_second", lambda value: f"{value:.0f}"),
    ("CPU µs/event", "cpu_us", lambda value: f"{value:.1f}"),
    ("core", "core_share", lambda value: f"{value:.0%}"),
    ("waited", "waited_share", lambda value: f"{value:.0%}"),
    ("events/read", "events_per_read", lambda value: f"{value:.2f}"),
    ("p99 gap ms", "gap_p99_us", lambda value: f"{value / 1000:.1f}"),
    ("memory MB", "memory", lambda value: f"{value / 1e6:.0f}"),
)


def render(cells: Sequence[Cell], idles: Sequence[Idle], works: Sequence[Work], subject: str, has_goals: bool) -> str:
    """The goals first, then each work's medians and what `subject` is to each of the others."""
    parts = [_goals_table(judge(cells, idles, subject))] if has_goals else []
    parts += [_work_table(cells, work, subject) for work in works]
    if idles:
        parts.append(_idle_table(idles))
    if problems := find_problems(cells):
        parts.append("\n".join(f"- {problem}" for problem in problems))
    return "\n\n".join(parts)


def find_problems(cells: Sequence[Cell]) -> list[str]:
    """Everything that was not answered as the backend answers it."""
    problems = []
    for cell in cells:
        if cell.errors:
            problems.append(f"{cell.proxy}, {cell.work}: {cell.errors} errors, the first: {cell.first_error}")
        if cell.altered:
            problems.append(f"{cell.proxy}, {cell.work}: {cell.altered} answers or events were altered on their way")
        if not cell.requests_per_second and not cell.events_per_second:
            problems.append(f"{cell.proxy}, {cell.work}: no answer at all")
    return problems


def _goals_table(verdicts: Iterable[Verdict]) -> str:
    rows = []
    for verdict in verdicts:
        goal, found = verdict.goal, verdict.found
        against = {"ratio": f", against {goal.peer}", "difference": f", less {goal.peer}'s", "value": ""}[goal.how]
        wanted = f"{'≤' if goal.is_most else '≥'} {goal.limit:g}{goal.unit}"
        shown = MISSING if found is None else f"{found:.2f}{goal.unit}"
        by_cpu = "" if verdict.by_cpu is None else f"{verdict.by_cpu:.2f}x"
        rows.append(
            [goal.title + against, shown, by_cpu, wanted, {True: "yes", False: "no", None: MISSING}[verdict.holds]]
        )
    return _table(["what", "found", "by CPU", "goal", "holds"], rows)


def _work_table(cells: Sequence[Cell], work: Work, subject: str) -> str:
    columns = _EVENTS if work.events else _REQUESTS
    speed = "events" if work.events else "requests"
    rows = []
    for proxy in dict.fromkeys(cell.proxy for cell in cells):
        medians = [_median(_by_round(cells, proxy, work.name, field), show) for _, field, show in columns]
        ratios = [_ratio(cells, subject, proxy, work.name, field) for field in (f"{speed}_per_second", "cpu_us")]
        rows.append([proxy, *medians, *ratios])
    title = f"{work.name}: {work.connections} connections, bodies of {len(work.body):,} bytes"
    names = [name for name, _, _ in columns]
    return f"{title}\n\n" + _table(["proxy", *names, f"{subject}: {speed}/s x", "CPU x"], rows)


def _median(values: dict[int, float], show: _Show) -> str:
    return show(median(values.values())) if values else MISSING


def _ratio(cells: Sequence[Cell], subject: str, proxy: str, work: str, field: str) -> str:
    goal = Goal(title="", work=work, field=field, how="ratio", peer=proxy, limit=0)
    found = _find(goal, cells, [], subject)
    return MISSING if found is None or proxy == subject else f"{found:.2f}"


def _idle_table(idles: Sequence[Idle]) -> str:
    return _table(["proxy", "KiB an idle connection"], [[idle.proxy, f"{idle.bytes / 1024:.1f}"] for idle in idles])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))
