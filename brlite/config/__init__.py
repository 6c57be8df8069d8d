"""Configuration: the options; reading, checking and printing them. First file: `options.py`."""
