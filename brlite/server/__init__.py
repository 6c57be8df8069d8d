"""A local engine's HTTP: the data of the OpenAI API, its translation, the handlers and the metrics.

Knows no tensors and no scheduling. May import: http, engine, tokenizer, sampling_params, outputs, config,
config_check, errors; aiohttp, msgspec; prometheus_client in `metrics.py` only.
"""
