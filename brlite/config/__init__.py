"""Configuration: the options, how files become them, and how they are checked and printed. First file: `options.py`."""
