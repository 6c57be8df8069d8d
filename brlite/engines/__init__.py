"""Engines behind one small contract: ours, others', and the toy that stands in for them.

`contract.py` is all that an engine's author has to read; `slot_backend.py` makes such an engine a `Backend`, and
`conformance.py` tries whether it keeps its promises. Knows no HTTP, no requests and no scheduling. May import:
engine.backend, tokenizer, worker, checkpoint, outputs, config, field_errors, errors; numpy, msgspec.
"""
