"""What a model is, without torch: its config, its shards, and the families that translate its names.

First file: `config.py`.
"""
