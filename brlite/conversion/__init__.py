"""Writes bundles: weights, packed files and side files. First file: `convert.py`."""
