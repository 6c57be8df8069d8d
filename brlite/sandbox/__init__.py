"""Runs templates and expressions of strangers in a child process, within a limit of time and memory."""
