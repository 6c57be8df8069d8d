"""Anthropic's client for Python: `anthropic_python.py URL MODEL`. The model says again what it was told."""

import sys

import anthropic
import pydantic


class Weather(pydantic.BaseModel):
    city: str
    days: int


@anthropic.beta_tool
def now() -> str:
    """The time."""
    return "noon"


url, model = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
hello = [{"role": "user", "content": "hello"}]
call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'

(card,) = client.models.list()
assert (card.id, card.display_name, card.type, card.created_at.year >= 2020) == (model, model, "model", True)
assert client.models.retrieve(model) == card
answer = client.messages.create(model=model, max_tokens=100, messages=hello)
assert (answer.content[0].text, answer.stop_reason) == ("hello", "end_turn")
with client.messages.stream(model=model, max_tokens=100, messages=hello) as stream:
    assert "".join(stream.text_stream) == "hello"
    assert stream.get_final_message().usage == answer.usage
assert client.messages.count_tokens(model=model, messages=hello).input_tokens == answer.usage.input_tokens

messages = [{"role": "user", "content": call}]
runner = client.beta.messages.tool_runner(model=model, max_tokens=100, messages=messages, tools=[now])
first, second = runner
assert (first.stop_reason, "noon" in second.content[0].text) == ("tool_use", True)

words = [{"role": "user", "content": '{"city":"Paris","days":2}'}]
parsed = client.messages.parse(model=model, max_tokens=100, messages=words, output_format=Weather)
assert parsed.parsed_output == Weather(city="Paris", days=2)

refusal = None
try:
    client.messages.create(model="other", max_tokens=100, messages=hello)
except anthropic.NotFoundError as error:
    refusal = error
assert refusal is not None
assert refusal.body["error"]["type"] == "not_found_error"
