"""lm-eval's `local-completions` and `local-chat-completions`: `lm_eval_harness.py URL MODEL`. For a real model."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

CHOICES = """
task: pets
dataset_path: json
dataset_kwargs: {data_files: {test: pets.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""
TEXTS = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: pets.json}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "cat"
generation_kwargs: {until: ["."], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""
url, model = sys.argv[1:]
program = Path(sys.executable).with_name("lm-eval")
documents = [{"question": "The animal that says meow is a", "choices": [" cat", " stone"]}] * 4
shared = f"model={model},num_concurrent=2,max_retries=1,tokenizer_backend=remote,max_length=2048"


def evaluate(folder: Path, kind: str, arguments: str, task: str, *more: str) -> dict[str, float]:
    command = [program, "run", "--model", kind, "--model_args", arguments, "--tasks", task, "--include_path", folder]
    out = folder / f"{kind}-{task}"
    done = subprocess.run([*command, "--output_path", out, *more], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.rglob("results_*.json")
    return json.loads(found.read_text())["results"][task]


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    (folder / "pets.json").write_text("\n".join(map(json.dumps, documents)))
    (folder / "pets.yaml").write_text(CHOICES)
    (folder / "words.yaml").write_text(TEXTS)
    completions = f"base_url={url}/v1/completions,{shared}"
    assert evaluate(folder, "local-completions", completions, "pets")["acc,none"] == 1.0
    assert "exact_match,none" in evaluate(folder, "local-completions", completions, "words")
    chats = f"base_url={url}/v1/chat/completions,model={model},num_concurrent=2,max_retries=1"
    assert "exact_match,none" in evaluate(folder, "local-chat-completions", chats, "words", "--apply_chat_template")
