"""The command `llm`: `llm_cli.py URL MODEL`. The model says again what it was told."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TOOL = '''
def now(at: str) -> str:
    """The time."""
    return f"It is {at}."
'''
url, model = sys.argv[1:]
program = Path(sys.executable).with_name("llm")
words = '{"city":"Paris","days":2}'
call = '<tool_call>\n{"name": "now", "arguments": {"at":"noon"}}\n</tool_call>'

with tempfile.TemporaryDirectory() as folder:
    card = {"model_id": "brlite", "model_name": model, "api_base": f"{url}/v1", "supports_tools": True}
    missing = {"model_id": "missing", "model_name": "other", "api_base": f"{url}/v1"}
    # YAML holds JSON.
    (Path(folder) / "extra-openai-models.yaml").write_text(json.dumps([{**card, "supports_schema": True}, missing]))
    environment = {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}

    def ask(*arguments: str, status: int = 0) -> str:
        done = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done.stdout.strip() or done.stderr

    assert ask("-m", "brlite", "hello") == "hello"
    assert ask("-m", "brlite", "--no-stream", "hello") == "hello"
    assert "hello" in ask("-m", "brlite", "-c", "hello again")
    for stream in ([], ["--no-stream"]):
        assert "It is noon" in ask("-m", "brlite", *stream, "--functions", TOOL, call)
        said = ask("-m", "brlite", *stream, "--schema", "city str, days int", words)
        assert json.loads(said) == {"city": "Paris", "days": 2}, said
    assert "does not exist" in ask("-m", "missing", "hello", status=1)
