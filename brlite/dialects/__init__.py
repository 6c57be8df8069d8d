"""Translates between clients' JSON and plain values: requests (`Generation`), results (`Event`) and errors.

A dialect is a pair of pure functions, without I/O; `DIALECTS` lists them. This room imports no aiohttp, no engine and
no tokenizer, so that the server and the proxy can both use it. First file: `generation.py`, then `openai_chat.py`.
"""

from brlite.dialects import anthropic, llama_infill, openai_chat, openai_completions, responses

DIALECTS = (openai_chat.DIALECT, openai_completions.DIALECT, responses.DIALECT, anthropic.DIALECT, llama_infill.DIALECT)
