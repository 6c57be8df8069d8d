"""Forwards requests for other servers' models: chooses an upstream, sends the request, relays the response.

Handles HTTP, not prompts or tokens. Of a request's body it reads the model's name and the fields that choose an
upstream; a response is checked for completeness. Never imports server.
"""
