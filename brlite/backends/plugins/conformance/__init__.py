"""Checks whether an engine keeps the plug-in contract."""
