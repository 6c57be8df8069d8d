"""The native step: C++ kernels behind a plain C interface, and how they are built, loaded, planned for and packed.

They know operations, not models: a plan, a flat list of operations with their tensors, is made once from a model's
config and weights, and one call runs it for a batch. Knows no requests and no text. May import: models, cache, errors,
config; numpy, msgspec, and setuptools where it builds. Never torch.
"""
