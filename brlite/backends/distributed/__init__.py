"""Several processes compute one model: ranks, their launcher and their messages."""
