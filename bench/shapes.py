"""Writes models of a known shape with random weights, for benches: what a step costs does not depend on the numbers.

    python bench/shapes.py 1.1b FOLDER            # TinyLlama's shape, 2.2 GB, for brlite, transformers and vLLM
    python bench/shapes.py 1.1b FOLDER --gguf     # and FOLDER.Q8_0.gguf for llama.cpp, from the same weights
    python bench/shapes.py 1.1b FOLDER --gguf Q4_0,Q4_K_M    # such files: codes of all but Q8_0 and Q4_0 are random
    python bench/shapes.py --short                # a tiny one of each, written, read back and removed: for CI

The tokenizer is a byte-level BPE, trained on the bench's own texts, so that prompts have as many tokens as usual; the
rest of its vocabulary are made-up words that only answers use. Weights are bfloat16. One tensor is in memory at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from measuring.prompts import PROMPTS, QUALITY_TEXT
from peers import gguf_q8
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.gguf_config import LAYER_NAMES, TENSOR_NAMES, hugging_face_name
from brlite.models.registry import find_family
from brlite.tokenizer import load_tokenizer

TEXTS = (PROMPTS, QUALITY_TEXT)
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
NUM_TRAINED = 8000  # at most: the texts give fewer
WEIGHT_SCALE = 0.02
ROWS_AT_A_TIME = 4096
MIXES = ("Q8_0", "Q4_0", "Q4_K_M", "IQ4_NL", "IQ4_XS", "MXFP4")

# Name → hidden size, intermediate size, layers, heads, key/value heads, vocabulary.
SHAPES: dict[str, tuple[int, int, int, int, int, int]] = {
    "tiny": (128, 256, 2, 4, 2, 6000),
    "1.1b": (2048, 5632, 22, 32, 4, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "8b": (4096, 14336, 32, 32, 8, 128256),
    "8b-2-layers": (4096, 14336, 2, 32, 8, 128256),  # what a machine with little memory can run of it
}


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    if args.short:
        _check()
        return 0
    write_shape(args.shape, args.folder, args.seed)
    for mix in args.gguf:
        write_gguf(args.folder, mix)
    return 0


def gguf_path(folder: Path, mix: str = "Q8_0") -> Path:
    """Where a GGUF form of a folder is: beside it, for a folder holds one format."""
    return folder.with_name(f"{folder.name}.{mix}.gguf")


def write_shape(shape: str, folder: Path, seed: int = 0) -> None:
    """Write `config.json`, tokenizer and `model.safetensors` into a new folder."""
    folder.mkdir(parents=True)
    config = llama_config(SHAPES[shape])
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(folder, config["vocab_size"])
    family = find_family(config)
    places = family.weight_targets(family.read_config(config))
    shapes = {name: place.shape for name, place in places.items()}
    _write_safetensors(folder / "model.safetensors", shapes, np.random.default_rng(seed))


def write_gguf(folder: Path, mix: str = "Q8_0") -> Path:
    """Write what `write_shape` wrote as a GGUF file beside the folder, in the types of a mix."""
    target = gguf_path(folder, mix)
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    names = {hugging_face_name(name): name for name in _gguf_names(config["num_hidden_layers"])}
    shapes = {names[name]: shape for name, shape in checkpoint.shapes().items()}
    tensors = (
        (names[tensor.name], _llama_rows(tensor.name, tensor.float32(), config)) for tensor in checkpoint.tensors()
    )
    kinds = {name: kind for name in shapes if (kind := _kind(name, mix)) is not None}
    gguf_q8.write_gguf(target, "llama", lambda writer: _add_metadata(writer, folder, config), shapes, tensors, kinds)
    return target


def _kind(name: str, mix: str) -> gguf.GGMLQuantizationType | None:
    """As llama.cpp mixes them, but that Q4_K_M has Q6_K in every second layer's v and down."""
    if mix == "Q8_0":
        return None
    part = name.split(".")[-2]
    is_even = name.startswith("blk.") and int(name.split(".")[1]) % 2 == 0
    if part == "output" or (mix == "Q4_K_M" and part in ("attn_v", "ffn_down") and is_even):
        return gguf.GGMLQuantizationType.Q6_K
    return gguf.GGMLQuantizationType[mix.removesuffix("_M")]


def llama_config(sizes: tuple[int, int, int, int, int, int], **fields: object) -> dict[str, Any]:
    """A `config.json` of Llama's architecture. `sizes` are an entry of `SHAPES`; `fields` replace others."""
    hidden, intermediate, layers, heads, kv_heads, vocab = sizes
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,  # no token ends an answer
        "torch_dtype": "bfloat16",
        **fields,
    }


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=min(NUM_TRAINED, vocab_size),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([path.read_text(encoding="utf-8") for path in TEXTS], trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    vocab = {**trained["vocab"]}
    for token_id in range(len(vocab), vocab_size):
        vocab[f"Ġ{token_id:05d}"] = token_id
    merges = [tuple(pair) for pair in trained["merges"]]
    whole = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    whole.add_special_tokens(list(SPECIAL_TOKENS))
    whole.pre_tokenizer = tokenizer.pre_tokenizer
    whole.decoder = decoders.ByteLevel()
    whole.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def _write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], random: np.random.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            for rows in _random_rows(shape, random):
                out.write(_bfloat16(rows).tobytes())


def _random_rows(shape: tuple[int, ...], random: np.random.Generator) -> Iterator[np.ndarray]:
    if len(shape) == 1:
        yield np.ones(shape, np.float32)
        return
    for begin in range(0, shape[0], ROWS_AT_A_TIME):
        rows = random.standard_normal((min(ROWS_AT_A_TIME, shape[0] - begin), shape[1]), np.float32)
        rows *= WEIGHT_SCALE
        yield rows


def _bfloat16(values: np.ndarray) -> np.ndarray:
    return (gguf_q8.round_to_bfloat16(values).view(np.uint32) >> 16).astype("<u2")


def _gguf_names(num_layers: int) -> Iterator[str]:
    yield from (f"{part}.weight" for part in TENSOR_NAMES)
    for layer in range(num_layers):
        yield from (f"blk.{layer}.{part}.weight" for part in LAYER_NAMES)


def _llama_rows(name: str, tensor: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """llama.cpp's order of a head's rows: it pairs neighbours for rope, Hugging Face pairs the two halves."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    halves = tensor.reshape(config[heads], 2, -1, tensor.shape[1])  # [H, 2, D/2, inputs]
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)


def _add_metadata(writer: gguf.GGUFWriter, folder: Path, config: Mapping[str, Any]) -> None:
    writer.add_name(folder.name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"])


def _add_tokenizer(writer: gguf.GGUFWriter, model: Mapping[str, Any]) -> None:
    tokens = sorted(model["vocab"], key=lambda token: int(model["vocab"][token]))
    kinds = [gguf.TokenType.CONTROL if token in SPECIAL_TOKENS else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_unk_token_id(SPECIAL_TOKENS.index("<unk>"))
    writer.add_bos_token_id(SPECIAL_TOKENS.index("<s>"))
    writer.add_eos_token_id(SPECIAL_TOKENS.index("</s>"))
    writer.add_add_bos_token(False)


def _check() -> None:
    """Both files of the tiny shape hold the same weights, but for rounding, and the same tokenizer."""
    with tempfile.TemporaryDirectory(prefix="brlite-bench-") as scratch:
        folder = Path(scratch) / "tiny"
        write_shape("tiny", folder)
        file = write_gguf(folder)
        plain = open_checkpoint(folder)
        rounded = open_checkpoint(file)
        expected, found = (
            {tensor.name: tensor.float32() for tensor in checkpoint.tensors()} for checkpoint in (plain, rounded)
        )
        if expected.keys() != found.keys():
            raise SystemExit("shapes: the two files hold different tensors")
        worst = max(float(np.abs(expected[name] - found[name]).max()) for name in expected)
        text = TEXTS[0].read_text(encoding="utf-8")
        counts = {len(load_tokenizer(path).encode(text)) for path in (folder, file)}
        size = sum(each.stat().st_size for each in folder.iterdir())
    print(f"tiny: {size:,} bytes, {counts} tokens for {len(text):,} characters, Q8_0 differs by {worst:.4f} at most")
    if worst > WEIGHT_SCALE / 10 or len(counts) != 1:
        raise SystemExit("shapes: the two files do not hold the same model")


def _mixes(text: str) -> tuple[str, ...]:
    mixes = tuple(text.split(","))
    if unknown := set(mixes) - set(MIXES):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}; allowed are {', '.join(MIXES)}")
    return mixes


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=tuple(SHAPES))
    parser.add_argument("folder", nargs="?", type=Path, help="a new folder")
    parser.add_argument(
        "--gguf",
        nargs="?",
        type=_mixes,
        const=("Q8_0",),
        default=(),
        metavar="LIST",
        help=f"files beside it, of {', '.join(MIXES)} (Q8_0)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random weights (0)")
    parser.add_argument("--short", action="store_true", help="write a tiny one and read it back")
    args = parser.parse_args(argv)
    if not args.short and args.folder is None:
        parser.error("needed are a shape and a folder")
    if not args.short and args.folder.exists():
        parser.error(f"{args.folder} is there already; remove it or name another")
    return args


if __name__ == "__main__":
    sys.exit(main())
