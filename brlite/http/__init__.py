"""The manners that every front door of brlite shares: error envelope, keys, request ids, time limits, event framing.

Knows no models and no engines. May import: config, errors; aiohttp, msgspec.
"""
