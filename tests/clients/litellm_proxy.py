"""LiteLLM's proxy in front, OpenAI's client before it: `litellm_proxy.py URL MODEL`. The model says what it hears."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import openai

CONFIG = """
model_list:
  - model_name: far
    litellm_params: {{model: hosted_vllm/{model}, api_base: "{url}/v1", api_key: none}}
  - model_name: gone
    litellm_params: {{model: hosted_vllm/other, api_base: "{url}/v1", api_key: none}}
general_settings: {{master_key: sk-any}}
litellm_settings: {{num_retries: 0, telemetry: false}}
"""
url, model = sys.argv[1:]
hello = [{"role": "user", "content": "hello"}]
tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


def use(client: openai.OpenAI) -> None:
    assert "far" in [each.id for each in client.models.list()]
    assert client.chat.completions.create(model="far", messages=hello).choices[0].message.content == "hello"
    chunks = client.chat.completions.create(model="far", messages=hello, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "hello"
    assert client.responses.create(model="far", input="hello").output_text == "hello"

    messages = [{"role": "user", "content": call}]
    first = client.chat.completions.create(model="far", messages=messages, tools=[tool]).choices[0]
    assert first.finish_reason == "tool_calls", first
    result = {"role": "tool", "tool_call_id": first.message.tool_calls[0].id, "content": "noon"}
    second = client.chat.completions.create(model="far", messages=[*messages, first.message, result], tools=[tool])
    assert "noon" in second.choices[0].message.content

    assert len(client.embeddings.create(model="far", input=["one", "two"]).data) == 2
    try:
        client.chat.completions.create(model="gone", messages=hello)
    except openai.NotFoundError:
        pass  # from here on the proxy leaves out "gone", and only that
    else:
        raise AssertionError("a model that is not there was answered")
    assert client.chat.completions.create(model="far", messages=hello).choices[0].message.content == "hello"


with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = str(probe.getsockname()[1])
    probe.close()
    config = Path(folder) / "config.yaml"
    config.write_text(CONFIG.format(url=url, model=model))
    program = Path(sys.executable).with_name("litellm")
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "true", "LITELLM_TELEMETRY": "False"}
    command = [program, "--config", config, "--host", "127.0.0.1", "--port", port, "--telemetry", "False"]
    with subprocess.Popen(command, env=environment, cwd=folder) as proxy:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="sk-any", max_retries=0, timeout=60)
        try:
            while True:
                try:
                    client.models.list()
                    break
                except openai.APIConnectionError:
                    assert proxy.poll() is None
                    time.sleep(0.5)
            use(client)
        finally:
            proxy.terminate()
