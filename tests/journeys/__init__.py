"""The journeys of docs/architecture.md, run for real: which of our functions a request, a token or a weight passes.

A file a journey: `journey()` runs it and returns what was recorded, and a test bounds it: a journey that grows fails.
`python -m tests.journeys` prints them all. `recorder.py` is the place to start.
"""
