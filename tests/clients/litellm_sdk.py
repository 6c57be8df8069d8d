"""LiteLLM's SDK over its routes `openai`, `anthropic` and `hosted_vllm`: `litellm_sdk.py URL MODEL`."""

import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "true"  # it would fetch a list of prices
import litellm

url, model = sys.argv[1:]
hello = [{"role": "user", "content": "hello"}]
tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'

for route, base in (("openai", f"{url}/v1"), ("hosted_vllm", f"{url}/v1"), ("anthropic", url)):
    fields = {"model": f"{route}/{model}", "api_base": base, "api_key": "none", "num_retries": 0, "max_tokens": 100}
    answer = litellm.completion(messages=hello, **fields)
    assert answer.choices[0].message.content == "hello", answer
    chunks = list(litellm.completion(messages=hello, stream=True, **fields))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello"

    messages = [{"role": "user", "content": call}]
    first = litellm.completion(messages=messages, tools=[tool], **fields).choices[0]
    assert first.finish_reason == "tool_calls", first
    result = {"role": "tool", "tool_call_id": first.message.tool_calls[0].id, "content": "noon"}
    second = litellm.completion(messages=[*messages, first.message, result], tools=[tool], **fields)
    assert "noon" in second.choices[0].message.content

    try:
        litellm.completion(messages=hello, **{**fields, "model": f"{route}/other"})
    except litellm.NotFoundError:
        pass
    else:
        raise AssertionError("a model that is not there was answered")
