"""OpenAI's client for Python: `openai_python.py URL MODEL`. The model says again what it was told."""

import sys

import openai
import pydantic


class Weather(pydantic.BaseModel):
    city: str
    days: int


url, model = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
hello = [{"role": "user", "content": "hello"}]
tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'

assert [each.id for each in client.models.list()] == [model]
answer = client.chat.completions.create(model=model, messages=hello)
assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("hello", "stop")
stream = client.chat.completions.create(model=model, messages=hello, stream=True)
assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "hello"
assert client.completions.create(model=model, prompt="hello").choices[0].text == "hello"
assert client.responses.create(model=model, input="hello").output_text == "hello"

messages = [{"role": "user", "content": call}]
first = client.chat.completions.create(model=model, messages=messages, tools=[tool]).choices[0]
assert first.finish_reason == "tool_calls"
result = {"role": "tool", "tool_call_id": first.message.tool_calls[0].id, "content": "noon"}
second = client.chat.completions.create(model=model, messages=[*messages, first.message, result], tools=[tool])
assert "noon" in second.choices[0].message.content

words = [{"role": "user", "content": '{"city":"Paris","days":2}'}]
parsed = client.chat.completions.parse(model=model, messages=words, response_format=Weather)
assert parsed.choices[0].message.parsed == Weather(city="Paris", days=2)

refusal = None
try:
    client.chat.completions.create(model="other", messages=hello)
except openai.NotFoundError as error:
    refusal = error
assert refusal is not None
assert refusal.code == "model_not_found"
