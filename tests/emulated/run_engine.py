"""Runs the whole engine on the emulated card, in a process of its own, and prints what came of it as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch_supa

from brlite.backends.torch.device import select_device
from brlite.backends.torch.probe import probe_device
from brlite.commands.doctor import examine
from brlite.config.options import Config, EngineConfig, ModelSpec
from brlite.errors import ConfigError
from brlite.llm import LLM, build_engine
from brlite.models.precision import PrecisionName
from brlite.sampling_params import SamplingParams
from tests.tiny_models import write_byte_tokenizer, write_tiny_model

PROMPTS = ["one", "a longer text, of several blocks", "and", "another that is long enough for a few of them", "x"]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True),
    SamplingParams(temperature=1.0, top_p=0.9, seed=1, max_tokens=4, ignore_eos=True, n=2),
    SamplingParams(temperature=0.8, top_k=20, seed=2, max_tokens=4, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=1.2, seed=3, presence_penalty=0.5, max_tokens=4, ignore_eos=True),
    SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, prompt_logprobs=1),
]
MODELS: list[tuple[str, PrecisionName]] = [
    ("llama", "bf16"),
    ("qwen3", "a_bf16_w_int8"),
    ("mistral-window", "a_bf16_w_int8_kv_int8"),
]
WRONG_OPERATORS = ("silu", "_safe_softmax", "rsqrt", "roll", "index_select", "mm", "masked_fill_", "embedding")


def make_config(path: Path, precision: PrecisionName, device: str, **engine: Any) -> Config:
    spec = ModelSpec(name="tiny", path=str(path), precision=precision, build_seq=96, build_batch=4)
    more = {"dtype": "float32", **engine}
    return Config(
        model=(spec,), engine=EngineConfig(backend="torch", device=device, threads=1, max_num_batched_tokens=24, **more)
    )


def generate(config: Config) -> list[list[list[int]]]:
    """The tokens of each prompt's completions."""
    with LLM(config=config) as llm:
        outputs = llm.generate(PROMPTS, PARAMS)
    return [[list(completion.token_ids) for completion in output.outputs] for output in outputs]


def describe(config: Config) -> dict[str, Any]:
    """What the backend says of itself."""
    backend = build_engine(config).backend
    backend.close()
    info = backend.info
    return {"device": info.device, "notes": info.notes, "dtype": info.dtype, "weight_bytes": info.weight_bytes}


def refusal(broken_operators: set[str], operator: str) -> str:
    """What the probe says of a card on which this operator is broken."""
    broken_operators.add(operator)
    try:
        return f"it passed: {probe_device(torch.device('supa', 0), torch.bfloat16)}"
    except ConfigError as error:
        return str(error)
    finally:
        broken_operators.clear()


def main(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = {"tokens": {}, "info": {}}
    for name, precision in MODELS:
        path = write_tiny_model(folder / name, name)
        write_byte_tokenizer(path)
        configs = {device: make_config(path, precision, device) for device in ("cpu", "supa")}
        report["tokens"][name] = {device: generate(config) for device, config in configs.items()}
        report["info"][name] = {device: describe(config) for device, config in configs.items()}
    report["operators"] = sorted(torch_supa.called_operators)
    report["num_shapes"] = len(torch_supa.seen_shapes)
    report["bfloat16"] = generate(make_config(folder / "llama", "bf16", "supa", dtype="auto"))
    report["auto"] = str(select_device("auto"))
    report["doctor"] = examine()["torch"]
    report["refusals"] = {name: refusal(torch_supa.wrong_operators, f"aten::{name}") for name in WRONG_OPERATORS}
    report["lacking"] = refusal(torch_supa.lacking_operators, "aten::mm")
    torch_supa.missing_operators.update(("aten::silu", "aten::index_copy_"))
    report["slow"] = describe(make_config(folder / "llama", "bf16", "supa"))["notes"]
    torch_supa.wrong_operators.add("aten::silu")
    try:
        LLM(config=make_config(folder / "llama", "bf16", "supa"))
    except ConfigError as error:
        report["not_served"] = str(error)
    return report


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
