"""aiohttp, adapted: listening, connections, keys, limits, error envelope, event streams. Knows no model.

First file: `middlewares.py`.
"""
