"""Runs untrusted templates and tokenizers in a child process, within limits of time and memory.

It does not interpret messages. First file: `child_process.py`.
"""
