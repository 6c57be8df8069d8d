"""The official client for the tests of this folder."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import openai
import pytest

from tests.limits import PATIENCE_SECONDS


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., openai.AsyncOpenAI]]:
    """`connect(url)` is OpenAI's client of that server, which tries everything once and is closed after the test."""
    async with AsyncExitStack() as stack:

        def make(url: str, api_key: str = "none") -> openai.AsyncOpenAI:
            client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=0, timeout=PATIENCE_SECONDS)
            stack.push_async_callback(client.close)
            return client

        yield make
