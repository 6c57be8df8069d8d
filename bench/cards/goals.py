"""The goals for one H100, and what `card.py --first` measured beside each: its last lines, and DIR/goals.json.

A goal without a number is listed as not measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

WANTED_SCHEDULES = 10_000


class Goal(NamedTuple):
    """What must be reached, at least, and how it is found in the rows of `speed.json`."""

    name: str
    least: float
    find: Callable[[list[dict[str, Any]]], float | None]


def report(folder: Path) -> list[str]:
    """A line for each goal, from the parts' files in `folder`. Writes goals.json there."""
    found = _read(folder / "speed.json")
    rows, name = found.get("rows", []), found.get("machine", {}).get("name", "this device")
    lines, results = [f"goals for one H100, measured on {name}:"], list[dict[str, Any]]()
    for goal in GOALS:
        value = goal.find(rows)
        word = "not measured" if value is None else "reached" if value >= goal.least else "MISSED"
        results.append({"goal": goal.name, "least": goal.least, "value": value, "result": word})
        lines.append(f"{word:13} {goal.name}: {'' if value is None else f'{value:.4g}, '}at least {goal.least:g}")
    for number, different, precision in _schedules(folder / "schedules.json"):
        word = "MISSED" if different else "reached" if number >= WANTED_SCHEDULES else "in part"
        text = f"equal bits, {precision}: {different} differences in {number} of {WANTED_SCHEDULES} schedules"
        results.append({"goal": text, "result": word})
        lines.append(f"{word:13} {text}")
    (folder / "goals.json").write_text(json.dumps(results, indent=1) + "\n")
    return lines


def _value(rows: list[dict[str, Any]], what: str, field: str, precision: str = "bf16") -> float | None:
    """A number of our kernels with the 8B shape."""
    wanted = {"shape": "8b", "precision": precision, "by": "brlite triton", "what": what}
    return next((row[field] for row in rows if wanted.items() <= row.items()), None)


def _int8_gain(rows: list[dict[str, Any]]) -> float | None:
    int8, bf16 = (_value(rows, "decode 1 @ 512", "seconds", name) for name in ("a_bf16_w_int8", "bf16"))
    return bf16 / int8 if int8 and bf16 else None


def _server_share(rows: list[dict[str, Any]]) -> float | None:
    """None also for a share far above 1: then the bare engine was disturbed, by compiling kernels for example."""
    notes = [row["note"] for row in rows if row["by"] == "brlite serve" and row["tokens_per_second"]]
    share = float(notes[0].partition("%")[0]) / 100 if notes else 0.0
    return share if 0 < share < 1.2 else None


GOALS = (
    Goal("share of bandwidth, 1 row, bf16", 0.75, lambda rows: _value(rows, "decode 1 @ 512", "bandwidth")),
    Goal("int8 over bf16, 1 row", 1.6, _int8_gain),
    Goal("share of bf16 peak, prefill of 1024", 0.6, lambda rows: _value(rows, "prefill 1024", "peak")),
    Goal("share of bf16 peak, prefill of 8192", 0.6, lambda rows: _value(rows, "prefill 8192", "peak")),
    Goal("tokens/s, 64 rows at 2048", 2500, lambda rows: _value(rows, "decode 64 @ 2048", "tokens_per_second")),
    Goal("server over bare engine", 0.95, _server_share),
)


def _schedules(path: Path) -> Iterator[tuple[int, int, str]]:
    for outcome in _read(path).get("outcomes", []):
        for finding in outcome["findings"]:
            if "schedules" in finding["values"]:
                yield finding["values"]["schedules"], finding["values"]["num_different"], finding["subject"]


def _read(path: Path) -> dict[str, Any]:
    """What a part wrote; nothing if it wrote nothing."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found
