"""Texts of strangers that could make a regular expression run away: each is read under a bound of CPU time.

Read in linear time, each case takes a second at most. In quadratic or exponential time it takes minutes or longer.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.warm import WarmPython

CPU_SECONDS = 60
IMPORTS = """
import asyncio, resource, sys
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from brlite.dialects.errors import error_body
from brlite.errors import Unauthorized
from brlite.server.handlers import ROUTES

def resolve(path):
    app = web.Application()
    app.add_routes(ROUTES)
    return asyncio.run(app.router.resolve(make_mocked_request("GET", path)))
"""
READS = {
    "a path of v1": "resolve('/' + 'v1//' * 4000 + 'x')",
    "an error for a path of slashes": "[error_body(Unauthorized(''), '/' * 16000 + 'messages.') for _ in range(1000)]",
}


@pytest.fixture(scope="module")
def python() -> Iterator[WarmPython]:
    python = WarmPython(IMPORTS)
    yield python
    python.close()


@pytest.mark.parametrize("name", READS)
def test_a_text_that_could_make_an_expression_run_away_is_read_in_linear_time(python: WarmPython, name: str) -> None:
    bound = f"resource.setrlimit(resource.RLIMIT_CPU, ({CPU_SECONDS}, {CPU_SECONDS}))\n"

    read = python.run(bound + READS[name])

    assert read.returncode == 0, read.stderr[-2000:]
