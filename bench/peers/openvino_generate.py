"""Runs in OpenVINO's venv: answers to prompts of one GGUF file, by OpenVINO GenAI's continuous batching.

    openvino_generate.py MODEL.gguf THREADS STREAMS

Each line of stdin is a JSON list: prompts and the tokens of an answer. Each line of stdout is the seconds that it took.
"""

import json
import sys
import time

import openvino_genai


def main() -> None:
    model, threads, streams = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_seqs = streams
    scheduler.enable_prefix_caching = False
    options = {"INFERENCE_NUM_THREADS": threads} if threads else {}
    pipeline = openvino_genai.LLMPipeline(model, "CPU", scheduler_config=scheduler, **options)
    answer(pipeline, ["Hello"], 1)
    for line in sys.stdin:
        print(json.dumps(answer(pipeline, *json.loads(line))), flush=True)


def answer(pipeline: openvino_genai.LLMPipeline, prompts: list[str], max_tokens: int) -> float:
    settings = openvino_genai.GenerationConfig()
    settings.max_new_tokens = max_tokens
    settings.ignore_eos = True
    settings.do_sample = settings.apply_chat_template = False
    start = time.perf_counter()
    pipeline.generate(prompts, settings)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
