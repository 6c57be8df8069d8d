"""A table in one test, since each test costs pytest milliseconds. All rows are tried, and those that fail are named."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

Row = Callable[..., AbstractContextManager[None]]


@contextmanager
def all_rows() -> Iterator[Row]:
    """`with all_rows() as row:`, then for each row `with row(what names it):` and its checks."""
    num_tried, failed = 0, []

    @contextmanager
    def row(*name: object) -> Iterator[None]:
        nonlocal num_tried
        num_tried += 1
        try:
            yield
        except (Exception, pytest.fail.Exception) as error:
            failed.append(f"{name}: {''.join(traceback.format_exception(error)).rstrip()}")

    yield row
    assert num_tried, "no rows"
    assert not failed, f"{len(failed)} rows\n" + "\n".join(failed)
