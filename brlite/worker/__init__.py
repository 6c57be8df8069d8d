"""Turns a `Batch` into numbers: runs the model, draws the tokens, owns weights, KV cache and the device.

Knows no text, no requests and no HTTP. May import: models, kernels, checkpoint, engine.backend, sampling_params,
outputs, config, errors; torch, numpy, msgspec.
"""
