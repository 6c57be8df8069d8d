"""NVIDIA's load generator AIPerf, 4 requests in flight: chats, completions and Responses streamed, and embeddings.

Each request must succeed, and its times must be found in the stream. AIPerf needs a tokenizer, by default from a hub.
Here it is a folder, with a token for each byte, as the toy has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

url, model = sys.argv[1:]
NUM_REQUESTS = 24
FOLDER = Path("tokenizer").resolve()
LENGTHS = ("--isl", "64", "--osl", "16")
LOAD = ("--concurrency", "4", "--request-count", str(NUM_REQUESTS), "--tokenizer", FOLDER, "--ui", "none")
# Offline it reads the cache of the hub alone, not a folder. Nothing can be dialled here anyway.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
STREAMED = ("chat", "completions", "responses")

letters = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(FOLDER)

for kind in (*STREAMED, "embeddings"):
    flags = ("--streaming", *LENGTHS) if kind in STREAMED else LENGTHS[:2]
    command = ("profile", "--url", url, "--model", model, "--endpoint-type", kind, "--artifact-dir", kind)
    subprocess.run([Path(sys.executable).with_name("aiperf"), *command, *LOAD, *flags], env=ENVIRONMENT, check=True)
    (report,) = Path(kind).rglob("profile_export_aiperf.json")
    found = json.loads(report.read_text())
    assert found["request_count"]["avg"] == NUM_REQUESTS, found
    assert not found.get("error_request_count"), found
    assert found["request_throughput"]["avg"] > 0
    if kind in STREAMED:
        assert found["time_to_first_token"]["avg"] > 0
        assert found["inter_token_latency"]["avg"] > 0
