"""Runs in ONNX Runtime GenAI's venv: answers to prompts of one converted model, in batches as large as the streams.

    onnx_generate.py FOLDER THREADS STREAMS

Lines of stdin and stdout are those of `openvino_generate.py`.
"""

import json
import sys
import time

import onnxruntime_genai as genai


def main() -> None:
    folder, threads, streams = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    config = genai.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = genai.Model(config)
    tokenizer = genai.Tokenizer(model)

    def answer(prompts: list[str], max_tokens: int) -> float:
        start = time.perf_counter()
        for first in range(0, len(prompts), streams):
            batch = prompts[first : first + streams]
            length = max(len(tokenizer.encode(prompt)) for prompt in batch) + max_tokens
            params = genai.GeneratorParams(model)
            params.set_search_options(batch_size=len(batch), min_length=length, max_length=length, do_sample=False)
            generator = genai.Generator(model, params)
            generator.append_tokens(tokenizer.encode_batch(batch))
            for _ in range(max_tokens):
                generator.generate_next_token()
        return time.perf_counter() - start

    answer(["Hello"], 1)
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
