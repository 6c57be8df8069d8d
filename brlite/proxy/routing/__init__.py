"""Which upstream serves a request: routes, health, breakers, limits."""
