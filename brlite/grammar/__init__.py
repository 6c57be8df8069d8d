"""Turns a JSON schema, regular expression or grammar into masks of allowed tokens, and into tokens that are forced.

Knows the tokenizer, and neither requests nor the engine. llguidance is imported here only, when a vocabulary is read.
First file: `compiler.py`; `schema_walk.py` checks a schema before it is compiled.
"""
