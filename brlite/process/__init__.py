"""The process that a command runs in: its standard streams, its open files, its duties as process 1.

It knows nothing of models, HTTP or the config, and starts nothing by itself. Read `output.py` first: because of it
no reader of the log can stop a server.
"""
