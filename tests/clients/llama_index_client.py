"""LlamaIndex over `OpenAILike` and its embeddings: `llama_index_client.py URL MODEL`. The model says what it hears."""

import sys

import openai
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Weather(BaseModel):
    city: str
    days: int


def now(at: str) -> str:
    """The time."""
    return f"It is {at}."


async def run_agent(llm: OpenAILike, words: str) -> str:
    return str(await FunctionAgent(tools=[FunctionTool.from_defaults(now)], llm=llm, streaming=True).run(words))


if __name__ == "__main__":
    import asyncio

    url, model = sys.argv[1:]
    access = {"api_base": f"{url}/v1", "api_key": "none", "max_retries": 0}
    flags = {"is_chat_model": True, "is_function_calling_model": True, "should_use_structured_outputs": True}
    llm = OpenAILike(model=model, context_window=8192, **access, **flags)
    hello = [ChatMessage(role="user", content="hello")]
    words = '{"city":"Paris","days":2}'
    call = '<tool_call>\n{"name": "now", "arguments": {"at":"noon"}}\n</tool_call>'

    assert llm.chat(hello).message.content == "hello"
    assert [*llm.stream_chat(hello)][-1].message.content == "hello"
    assert OpenAILike(model=model, is_chat_model=False, **access).complete("hello").text == "hello"
    assert "It is noon" in asyncio.run(run_agent(llm, call))
    structured = llm.as_structured_llm(Weather).chat([ChatMessage(role="user", content=words)])
    assert structured.raw == Weather(city="Paris", days=2), structured

    embedding = OpenAILikeEmbedding(model_name=model, **access)
    one, two = embedding.get_text_embedding_batch(["one", "two"])
    assert len(one) == len(two) > 0

    try:
        OpenAILike(model="other", **access, **flags).chat(hello)
    except openai.NotFoundError:
        pass
    else:
        raise AssertionError("a model that is not there was answered")
