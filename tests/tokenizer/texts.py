"""Texts that tokenizers have tripped over: digits, white space, scripts, joined emoji, the texts of special tokens."""

from __future__ import annotations

import json
from pathlib import Path

# The ids of SmolLM2's own tokenizer for each text, as llama.cpp gave them for the default model's GGUF file.
SMOLLM2_IDS: list[dict[str, object]] = json.loads((Path(__file__).parent / "smollm2_ids.json").read_bytes())
TEXTS = [str(row["text"]) for row in SMOLLM2_IDS]
# What the tiny vocabularies of these tests are trained on.
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the other dogs bark at the brown fox.",
    "There is nothing either good or bad, but thinking makes it so. To be or not to be?",
    "In 2024 the answer was 3.14159, in 1999 it was 42; the year 2000 came and went.",
    "def function(argument):\n    return argument + other_argument\n\n    if argument:\n        pass\n",
    "你好，世界！你好吗？今天天气很好，世界很大。",
    "Привет, мир! Привет всем. Hello, world! Hello there.",
] * 4
