"""The table of fields says what the request structs decode, and docs/fields.md says what the table does."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from brlite.dialects.fields import NOT_DECODED, OBEYED

DOCS = Path(__file__).parents[2] / "docs"
PROGRAM = runpy.run_path(str(DOCS / "fields.py"))


@pytest.mark.parametrize("endpoint", PROGRAM["REQUESTS"])
def test_each_field_that_an_endpoint_decodes_has_a_row_and_each_row_is_decoded(endpoint: str) -> None:
    rows = {name for row in OBEYED if endpoint in row.endpoints for name in row.names.split()}

    assert rows == set(PROGRAM["REQUESTS"][endpoint].__struct_fields__)


def test_no_field_is_both_obeyed_and_not_decoded() -> None:
    obeyed = [name for row in OBEYED for name in row.names.split()]
    others = [name for row in NOT_DECODED for name in row.names.split()]

    assert len(obeyed) == len(set(obeyed))
    assert not set(obeyed) & set(others)


def test_the_page_is_printed_from_the_table() -> None:
    assert (DOCS / "fields.md").read_text(encoding="utf-8") == PROGRAM["render"](), "run: python docs/fields.py"
