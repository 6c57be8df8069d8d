"""A model's description, without torch: its config, its shards, and the families that translate its names.

First file: `config.py`.
"""
