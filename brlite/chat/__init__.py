"""Renders conversations as a model's text, by templates and built-in formats, and parses replies. Does not tokenize."""
