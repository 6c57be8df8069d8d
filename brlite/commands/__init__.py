"""The commands of `brlite`, a file each. First file: `cli.py`."""
