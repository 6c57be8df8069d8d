"""Kernels for cards in Triton: an operation a file, named as its twin in C++ (`backends/native/src`)."""
