"""Bytes of HTTP/1.1: heads, framing, event streams, connections to upstreams and their addresses."""
