"""Decides which tokens to compute next, and what a token that came back means for its request.

Knows no tensors and no HTTP. May import: constraint, tokenizer, sampling_params, outputs, config, errors; msgspec.
Synchronous but for `async_engine.py`; all state is touched on the event-loop thread only.
"""
