"""Engines that are not brlite's own, behind a contract of four methods. First file: `contract.py`."""
