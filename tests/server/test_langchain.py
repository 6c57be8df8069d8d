"""langchain-openai's embeddings, where it is installed."""

from __future__ import annotations

import asyncio
import math

import pytest

from tests.fakes import hidden_state
from tests.server.conftest import Client

langchain_openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
httpx = pytest.importorskip("httpx", reason="httpx, which langchain-openai uses, is not installed")


async def test_documents_and_queries_are_embedded(client: Client) -> None:
    async with httpx.AsyncClient() as http_async_client:
        with httpx.Client() as http_client:
            embeddings = langchain_openai.OpenAIEmbeddings(
                model="fake",
                base_url=f"{client.url}/v1",
                api_key="none",
                chunk_size=2,
                check_embedding_ctx_length=False,  # else it sends the token ids of OpenAI's own vocabulary
                http_client=http_client,
                http_async_client=http_async_client,
            )

            documents = await embeddings.aembed_documents(["one", "two", "three"])
            query = await embeddings.aembed_query("one")
            in_a_thread = await asyncio.to_thread(embeddings.embed_query, "one")

    state = hidden_state(b"one")
    assert len(documents) == 3
    assert query == in_a_thread == documents[0]
    assert query == pytest.approx([value / math.hypot(*state) for value in state], rel=1e-6)
