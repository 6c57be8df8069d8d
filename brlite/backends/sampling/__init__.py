"""Draws tokens on the host: the reference sampler and its random numbers."""
