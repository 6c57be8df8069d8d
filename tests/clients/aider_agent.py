"""aider edits a file: `aider_agent.py URL MODEL`. The model says again what it was told: the whole file."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

QUIET = (
    "--yes-always",
    "--no-git",
    "--no-check-update",
    "--no-show-release-notes",
    "--analytics-disable",
    "--no-pretty",
)
PLAIN = (
    "--edit-format",
    "whole",
    "--no-show-model-warnings",
    "--map-tokens",
    "0",
    "--no-detect-urls",
    "--no-gitignore",
)
url, model = sys.argv[1:]
program = Path(sys.executable).with_name("aider")

for more in ([], ["--no-stream"]):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "hello.py"
        file.write_text("print('old')\n")
        environment = {**os.environ, "HOME": folder, "OPENAI_API_BASE": f"{url}/v1", "OPENAI_API_KEY": "none"}
        environment["LITELLM_LOCAL_MODEL_COST_MAP"] = "true"
        message = "hello.py\n```\nprint('new')\n```\n"
        command = [program, *QUIET, *PLAIN, *more, "--model", f"openai/{model}", "--message", message, file.name]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert file.read_text() == "print('new')\n", done.stdout + done.stderr
