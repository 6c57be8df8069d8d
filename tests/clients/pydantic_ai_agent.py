"""Agents of Pydantic AI over chats, Responses and Messages: `pydantic_ai_agent.py URL MODEL`."""

import sys

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider


class Weather(BaseModel):
    city: str
    days: int


url, name = sys.argv[1:]
openai = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
anthropic = AnthropicProvider(base_url=url, api_key="none")
call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'

for model in (
    OpenAIChatModel(name, provider=openai),
    OpenAIResponsesModel(name, provider=openai),
    AnthropicModel(name, provider=anthropic),
):
    agent = Agent(model)

    @agent.tool_plain
    def now() -> str:
        """The time."""
        return "noon"

    assert Agent(model).run_sync("hello").output == "hello"
    result = agent.run_sync(call)
    assert "noon" in result.output, result
    if not isinstance(model, AnthropicModel):  # which refuses it for models whose names it does not know
        weather = Agent(model, output_type=NativeOutput(Weather)).run_sync('{"city":"Paris","days":2}')
        assert weather.output == Weather(city="Paris", days=2)
