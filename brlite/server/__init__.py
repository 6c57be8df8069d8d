"""The OpenAI endpoints for local models. First file: `handlers.py`, whose `ROUTES` list every endpoint."""
