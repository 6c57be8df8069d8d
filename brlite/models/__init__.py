"""The mathematics of a decoder in torch, and the families that translate their config and weight names onto it.

Knows no requests, no files and no devices by name. May import: config, errors; torch.
"""
