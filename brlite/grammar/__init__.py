"""Turns a JSON schema, regular expression or grammar into masks of allowed tokens, and into forced tokens.

Uses the tokenizer, but no requests and no engine. Only this package imports llguidance, when it reads a vocabulary.
First file: `compiler.py`; `schema_walk.py` checks a schema before it is compiled.
"""
