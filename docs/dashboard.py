"""Writes deploy/grafana/brlite.json from the queries of docs/metrics.md: `python docs/dashboard.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "metrics.md"
DASHBOARD = ROOT / "deploy" / "grafana" / "brlite.json"
WIDTH, HEIGHT, NUM_COLUMNS = 12, 8, 2  # of a panel; a page is 24 wide
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def queries() -> list[tuple[str, str]]:
    """Each panel's name and its query."""
    section = PAGE.read_text(encoding="utf-8").split("## Queries for Grafana", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^\| ([^|]+) \| `(.+)` \|$", section, re.MULTILINE)


def unit(query: str) -> str:
    """Grafana's name of the unit of what a query finds."""
    if "_seconds_" in query:
        return "s"
    return "percentunit" if "_perc" in query or "_hits_" in query or "_accepted_" in query else "short"


def panel(number: int, name: str, query: str) -> dict[str, Any]:
    """One query over time."""
    row, column = divmod(number, NUM_COLUMNS)
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": name[0].upper() + name[1:],
        "datasource": SOURCE,
        "gridPos": {"x": column * WIDTH, "y": row * HEIGHT, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit(query), "min": 0}, "overrides": []},
        "targets": [{"refId": "A", "datasource": SOURCE, "expr": query}],
    }


def dashboard() -> str:
    """The dashboard as Grafana imports it."""
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    found = {
        "uid": "brlite",
        "title": "brlite",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source]},
        "panels": [panel(number, *row) for number, row in enumerate(queries())],
    }
    return json.dumps(found, indent=1) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(dashboard(), encoding="utf-8")
