"""Which steps are captured as CUDA graphs, and the memory that these take beside weights and KV cache.

Computed from a model's sizes, without torch: `brlite check` says it, and an automatic KV cache leaves room for it.
"""

from __future__ import annotations

from brlite.config.options import EngineConfig, ModelSpec
from brlite.models.config import FLOAT32_BYTES, ModelConfig

MAX_GRAPH_ROWS = 128  # longer steps run without a graph
MIN_SPLIT = 256  # positions of a context that attention computes in one piece; a power of two
MAX_SPLITS = 64  # of one context
MAX_PARTS = 8  # of a product's sum, which several programs compute: each has its result in memory
DRIVER_BYTES = 2**24  # of one graph, for its launches in the driver: an assumption, it was not measured


def most_rows(spec: ModelSpec, engine: EngineConfig) -> int:
    """The rows of the largest step without a prompt, with drafts if there are any. Graphs have them."""
    if engine.speculation == "off":
        return spec.build_batch
    return max(spec.build_batch, min(spec.build_batch, engine.max_draft_seqs) * (1 + engine.max_draft_tokens))


def graph_rows(max_rows: int) -> list[int]:
    """The rows of each graph: 1, 2, 4 and so on, the last for `max_rows`."""
    return [1 << power for power in range((min(max_rows, MAX_GRAPH_ROWS) - 1).bit_length() + 1)]


def split_size(max_length: int) -> int:
    """The positions whose attention is computed in one piece, for contexts up to `max_length`: a power of two."""
    return max(MIN_SPLIT, 1 << (-(-max_length // MAX_SPLITS) - 1).bit_length())


def graph_bytes(config: ModelConfig, max_rows: int, max_length: int) -> int:
    """The most bytes that the graphs of a model take. They share the memory in which a step computes."""
    rows = graph_rows(max_rows)
    results = sum(rows) * (config.hidden_size + config.vocab_size)
    num_splits = -(-max_length // split_size(max_length))
    attention = num_splits * config.num_heads * (config.head_dim + 2)
    products = MAX_PARTS * (config.q_size + 2 * config.kv_size + 2 * config.hidden_size)
    activations = config.intermediate_size + 2 * config.q_size + 4 * config.hidden_size + config.vocab_size
    step = rows[-1] * (attention + products + activations)
    return FLOAT32_BYTES * (results + step) + len(rows) * DRIVER_BYTES
