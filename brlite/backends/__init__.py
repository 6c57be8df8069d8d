"""Implementations of `engine/backend.py`: they compute the steps that the scheduler decides. No text, no requests and
no HTTP. First file: `choose.py`.
"""
