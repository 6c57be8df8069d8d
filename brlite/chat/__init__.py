"""A conversation becomes a model's text: templates and built-in formats. Knows no tokens."""
