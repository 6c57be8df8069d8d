"""The process that a command runs in: its standard streams, its open files, its duties as process 1, its sandbox.

It has no models, HTTP or config, and starts nothing by itself. First file: `output.py`, which keeps a blocked reader of
the log from blocking the server.
"""
