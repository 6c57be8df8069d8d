"""Gives llama.cpp's logits of every position of a text. Run by the Python of the venv that has the wheel `cyllama`.

For each line of standard input, a JSON list of token ids, it writes [tokens, vocabulary] float32 to standard output.
`xllamacpp`, which serves, tells no more than the likeliest tokens; this wheel has llama.cpp's own `get_logits_ith`.
"""

from __future__ import annotations

import argparse
import array
import json
import os
import sys
from typing import BinaryIO

from cyllama.llama import llama_cpp


class Model(llama_cpp.LlamaModel):  # type: ignore[misc]
    """With the number that the wheel's `LlamaContext` asks its model for."""

    @property
    def n_vocab(self) -> int:
        return int(self.get_vocab().n_vocab)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    for name in ("--context", "--threads"):
        parser.add_argument(name, type=int, required=True)
    args = parser.parse_args()

    # llama.cpp may print to standard output: from here on only logits go there.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    llama_cpp.llama_backend_init()
    context = llama_cpp.LlamaContext(Model(args.model, llama_cpp.LlamaModelParams(), False), _params(args), False)
    batch = llama_cpp.LlamaBatch(n_tokens=args.context, embd=0, n_seq_max=1)
    for line in sys.stdin:
        _write_logits(context, batch, json.loads(line), output)


def _params(args: argparse.Namespace) -> llama_cpp.LlamaContextParams:
    params = llama_cpp.LlamaContextParams()
    params.n_ctx = params.n_batch = params.n_ubatch = args.context
    if args.threads:
        params.n_threads = params.n_threads_batch = args.threads
    return params


def _write_logits(
    context: llama_cpp.LlamaContext, batch: llama_cpp.LlamaBatch, token_ids: list[int], output: BinaryIO
) -> None:
    context.kv_cache_clear(True)
    batch.clear()
    for position, token_id in enumerate(token_ids):
        batch.add(token_id, position, [0], True)
    context.decode(batch)  # raises where it fails
    for position in range(len(token_ids)):
        output.write(array.array("f", context.get_logits_ith(position)).tobytes())
    output.flush()


if __name__ == "__main__":
    main()
