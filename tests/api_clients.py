"""Official clients of servers without TLS: they do not read the system's certificates, which takes 50 ms a client."""

from __future__ import annotations

import ssl

import openai

from tests.limits import PATIENCE_SECONDS

NO_CERTIFICATES = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def openai_client(url: str, api_key: str = "none") -> openai.AsyncOpenAI:
    """Tries everything once."""
    return openai.AsyncOpenAI(
        base_url=f"{url}/v1",
        api_key=api_key,
        max_retries=0,
        timeout=PATIENCE_SECONDS,
        http_client=openai.DefaultAsyncHttpxClient(verify=NO_CERTIFICATES),
    )
