"""Reads model folders and files: safetensors, `.bin`, GGUF; fetches them by name. One tensor in memory at a time.

Knows no network layers and no requests. May import: models (its config), config, errors; torch, safetensors, gguf.
"""
