"""The HTTP layer on aiohttp: listening, connections, keys, limits, errors, event streams. Independent of models.

First file: `middlewares.py`.
"""
