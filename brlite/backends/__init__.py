"""Implementations of `engine/backend.py`: they compute what the scheduler has decided. Know no text, no requests and no
HTTP. First file: `choose.py`.
"""
