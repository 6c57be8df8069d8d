"""brlite: a compact asyncio server for large language models."""

__version__ = "0.1.0"
