"""smolagents' `OpenAIModel` and its tool-calling agent: `smolagents_client.py URL MODEL`. For a real model."""

import sys

import openai
from smolagents import OpenAIModel, ToolCallingAgent, tool
from smolagents.memory import ActionStep


@tool
def now(at: str) -> str:
    """The time.

    Args:
        at: a word
    """
    return f"It is {at}."


url, name = sys.argv[1:]
model = OpenAIModel(name, api_base=f"{url}/v1", api_key="none", client_kwargs={"max_retries": 0}, max_tokens=200)
hello = [{"role": "user", "content": [{"type": "text", "text": "Say hello."}]}]

answer = model.generate(hello)
assert answer.content, answer
assert answer.token_usage.output_tokens > 0
assert "".join(delta.content or "" for delta in model.generate_stream(hello, temperature=0))
assert model.generate(hello, stop_sequences=["e"], temperature=0).content.find("e") == -1

# The agent says tool_choice="required". A small model calls some tool; what counts is that each call is well formed.
agent = ToolCallingAgent(tools=[now], model=model, max_steps=2, verbosity_level=0)
agent.run("Call now with at='noon'.")
steps = [step for step in agent.memory.steps if isinstance(step, ActionStep) and step.model_output_message]
assert steps, agent.memory
assert all(step.tool_calls for step in steps), [step.error for step in steps]
assert {call.name for step in steps for call in step.tool_calls} <= {"now", "final_answer"}

schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
schema["additionalProperties"] = False
response_format = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
assert model.generate(hello, response_format=response_format).content.startswith('{"city"')

try:
    OpenAIModel("other", api_base=f"{url}/v1", api_key="none", client_kwargs={"max_retries": 0}).generate(hello)
except openai.NotFoundError:
    pass
else:
    raise AssertionError("a model that is not there was answered")
