"""Decides which tokens to compute next, and applies each step's result to the requests.

Uses no tensors and no HTTP. Synchronous but for `async_engine.py`, `fair_thread.py` and `prompt_encoder.py`; all state
is touched on the event-loop thread only. First file: `scheduler.py`.
"""
