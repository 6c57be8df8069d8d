"""Instructor over OpenAI's chats and Anthropic's Messages: `instructor_client.py URL MODEL`."""

import sys

import anthropic
import instructor
import openai
from pydantic import BaseModel


class Weather(BaseModel):
    city: str
    days: int


url, model = sys.argv[1:]
words = '{"city":"Paris","days":2}'
call = f'<tool_call>\n{{"name": "Weather", "arguments": {words}}}\n</tool_call>'
chats = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
messages = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)

for client, mode, said in (
    (instructor.from_openai(chats, mode=instructor.Mode.TOOLS), "tools", call),
    (instructor.from_openai(chats, mode=instructor.Mode.JSON_SCHEMA), "schema", words),
    (instructor.from_anthropic(messages, mode=instructor.Mode.ANTHROPIC_TOOLS), "tools", call),
):
    weather = client.chat.completions.create(
        model=model,
        max_tokens=200,
        max_retries=0,
        response_model=Weather,
        messages=[{"role": "user", "content": said}],
    )
    assert weather.model_dump() == {"city": "Paris", "days": 2}, (mode, weather)
