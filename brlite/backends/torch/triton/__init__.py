"""Triton kernels for cards: one operation per file, with the name of its C++ version (`backends/native/src`)."""
