"""Runs in CTranslate2's venv: answers to prompts of one converted model, in batches of as many prompts as streams.

    ctranslate2_generate.py FOLDER THREADS STREAMS

Lines of stdin and stdout are those of `openvino_generate.py`.
"""

import json
import sys
import time

import ctranslate2
from tokenizers import Tokenizer


def main() -> None:
    folder, threads, streams = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    generator = ctranslate2.Generator(folder, compute_type="int8", intra_threads=threads, inter_threads=1)
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")

    def answer(prompts: list[str], max_tokens: int) -> float:
        start = time.perf_counter()
        results = generator.generate_batch(
            [tokenizer.encode(prompt).tokens for prompt in prompts],
            max_batch_size=streams,
            min_length=max_tokens,
            max_length=max_tokens,
            include_prompt_in_result=False,
        )
        assert all(len(result.sequences_ids[0]) == max_tokens for result in results)
        return time.perf_counter() - start

    answer(["Hello"], 1)
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
