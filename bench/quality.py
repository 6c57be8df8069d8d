"""What rounding costs: each precision's perplexity, KL divergence to float32 and agreement with it, over one text.

    python bench/quality.py             # all precisions beside llama.cpp's Q8_0 and Q4_1: some minutes
    python bench/quality.py --short     # 32 tokens, two precisions, no llama.cpp: for CI
    python bench/quality.py --mixed --peers ''    # as a model of 16 bits, whose groups no file has rounded to 4

Every precision starts from the same file. The reference computes in float32 with the file's own numbers; bf16 and int8
round them to bfloat16 first, and auto keeps what is quantized. The text is read with the model's own tokenizer in
windows that begin anew, and every one of them is given to all in turn.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol, cast, get_args

import msgspec
import numpy as np
import torch
from measuring import prompts, subject
from measuring.mixed_model import write_mixed
from measuring.torch_model import TorchModel
from measuring.venvs import ToolError
from msgspec import Struct
from peers import gguf_q8, launchers, llama_cpp

from brlite.config.options import ModelSpec
from brlite.engine.backend import Backend, Batch, ScheduledSeq
from brlite.errors import BrliteError
from brlite.llm import build_engine
from brlite.models.config import KVDtype
from brlite.models.precision import PrecisionName, PrecisionOption
from brlite.tokenizer import load_tokenizer

ROWS_AT_A_TIME = 64
KV_DTYPES: dict[str, KVDtype] = {"a_bf16_w_int8_kv_int8": "int8"}
PEERS = ("q8_0", "q4_1")
SHORT = {"tokens": 32, "window": 32, "peers": [], "precisions": ["auto", "a_bf16_w_int8_kv_int8"]}

Logits = Callable[[list[int]], np.ndarray]


class _HasLogits(Protocol):
    """What the native backend has beyond `Backend`."""

    def logits(self, token_ids: list[int]) -> np.ndarray: ...


class Scores(Struct, kw_only=True):
    """What each token of the text adds, in the order of the text."""

    losses: list[float] = []
    divergences: list[float] = []
    agreements: list[bool] = []


class Row(Struct, frozen=True, kw_only=True):
    """One precision's result. `kl_error` is the standard error of `kl`; `path_difference` see `_path_difference`."""

    name: str
    perplexity: float
    kl: float
    kl_error: float
    kl_p99: float
    agreement: float
    path_difference: float | None


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 if a model or a peer could not be had."""
    args = _arguments(argv)
    try:
        with ExitStack() as stack:
            rows = _measure(args, stack)
    except (BrliteError, ToolError) as error:
        print(f"quality: error: {error}", file=sys.stderr)
        return 2
    print(_render(rows))
    if args.json is not None:
        kept = {name: getattr(args, name) for name in ("model", "tokens", "window", "backend")}
        args.json.write_text(json.dumps({"settings": kept, "rows": msgspec.to_builtins(rows)}, indent=1) + "\n")
    return 0


def _measure(args: argparse.Namespace, stack: ExitStack) -> list[Row]:
    model = subject.find_model(args.model)
    if args.mixed:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="brlite-bench-"))) / "mixed"
        write_mixed(launchers.hf_folder(model.path, Path(sys.executable)), folder)
        model = subject.Model(f"{model.name}, mixed", folder)
    windows = list(_windows(args, model.path))
    print(f"{model.name}: {sum(map(len, windows))} tokens in windows of {args.window}", flush=True)
    reference = TorchModel(model.path, ModelSpec(build_seq=args.window), "float32", "float32").logits
    found: dict[str, Logits] = {}
    differences = {}
    for precision in args.precisions:
        backend = _open(args, model, precision, stack)
        name = f"brlite {backend.info.name} {precision}"
        found[name] = FULL_LOGITS[backend.info.name](backend, model.path)
        differences[name] = _path_difference(backend, found[name], windows[0])
    for peer in args.peers:
        found[f"llama.cpp {peer.upper()}"] = _open_peer(args, peer, model.path, backend.info.vocab_size, stack)
    scores = {"float32": Scores(), **{name: Scores() for name in found}}
    for number, window in enumerate(windows):
        print(f"window {number + 1} of {len(windows)} …", file=sys.stderr)
        expected = reference(window)
        _add(scores["float32"], expected, expected, window)
        for name, logits in found.items():
            _add(scores[name], expected, logits(window), window)
    return [_row(name, each, differences.get(name)) for name, each in scores.items()]


def _windows(args: argparse.Namespace, path: Path) -> Iterator[list[int]]:
    """The text's tokens, so many at a time; a rest of one token predicts nothing."""
    token_ids = load_tokenizer(path).encode(args.text.read_text(encoding="utf-8"), add_special_tokens=False)
    token_ids = token_ids[: args.tokens or None]
    for start in range(0, len(token_ids) - 1, args.window):
        yield token_ids[start : start + args.window]


def _open(args: argparse.Namespace, model: subject.Model, precision: str, stack: ExitStack) -> Backend:
    tables = subject.chosen(args)
    tables["engine"]["max_num_batched_tokens"] = args.window
    tables["model"]["precision"] = precision
    backend = build_engine(subject.engine_config(model, tables, build_seq=args.window, build_batch=1)).backend
    stack.callback(backend.close)
    return backend


def _native_logits(backend: Backend, path: Path) -> Logits:
    return cast(_HasLogits, backend).logits


def _torch_logits(backend: Backend, path: Path) -> Logits:
    """The same numbers from the parts that the backend is made of."""
    info = backend.info
    spec = ModelSpec(build_seq=info.max_model_len, precision=msgspec.convert(info.precision, PrecisionName))
    return TorchModel(path, spec, "auto", KV_DTYPES.get(info.precision, "bfloat16")).logits


# How each kind of backend gives the logits of every position.
FULL_LOGITS: dict[str, Callable[[Backend, Path], Logits]] = {"native": _native_logits, "torch": _torch_logits}


def _open_peer(args: argparse.Namespace, peer: str, path: Path, vocab_size: int, stack: ExitStack) -> Logits:
    if path.suffix != ".gguf":
        raise ToolError(f"{path}: llama.cpp needs the model as a .gguf file; --peers '' leaves it out")
    gguf = gguf_q8.find_q8_file(path) if peer == "q8_0" else path
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="brlite-bench-")))
    opened = stack.enter_context(llama_cpp.open_llama(gguf, vocab_size, args.window, args.threads, folder))
    return opened.logits


def _path_difference(backend: Backend, logits: Logits, window: list[int]) -> float:
    """How far the served logprobs of a window, from `execute`, are from those of the logits that are judged here."""
    table = list(range(math.ceil(len(window) / backend.info.block_size)))
    seq = ScheduledSeq(0, 0, window, table, prompt_targets=window[1:], num_prompt_logprobs=0)
    served = [entry.logprob for entry in backend.execute(Batch([seq])).seqs[0].prompt_logprobs]
    judged = _logprobs(logits(window)[:-1]).gather(1, torch.tensor(window[1:])[:, None])[:, 0]
    return float((torch.tensor(served, dtype=torch.float64) - judged).abs().max())


def _add(scores: Scores, expected: np.ndarray, logits: np.ndarray, window: list[int]) -> None:
    """Score a window: what each position but the last says of the next token."""
    for start in range(0, len(window) - 1, ROWS_AT_A_TIME):
        end = min(start + ROWS_AT_A_TIME, len(window) - 1)
        p, q = _logprobs(expected[start:end]), _logprobs(logits[start:end])
        targets = torch.tensor(window[start + 1 : end + 1])[:, None]
        scores.losses += (-q.gather(1, targets)[:, 0]).tolist()
        scores.divergences += (p.exp() * (p - q)).sum(dim=1).tolist()
        scores.agreements += (p.argmax(dim=1) == q.argmax(dim=1)).tolist()


def _logprobs(logits: np.ndarray) -> torch.Tensor:
    return torch.log_softmax(torch.from_numpy(np.array(logits, np.float64)), dim=1)


def _row(name: str, scores: Scores, path_difference: float | None) -> Row:
    divergences = np.array(scores.divergences)
    return Row(
        name=name,
        perplexity=math.exp(np.mean(scores.losses)),
        kl=float(divergences.mean()),
        kl_error=float(divergences.std() / math.sqrt(len(divergences))),
        kl_p99=float(np.percentile(divergences, 99)),
        agreement=float(np.mean(scores.agreements)),
        path_difference=path_difference,
    )


def _render(rows: Sequence[Row]) -> str:
    """A Markdown table; KL is also given as a share of Q8_0's."""
    q8 = next((row.kl for row in rows if row.name == "llama.cpp Q8_0"), None)
    lines = [
        "| | perplexity | mean KL | ± | KL / Q8_0's | KL p99 | same top token | served differs by |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        share = "–" if q8 is None else f"{row.kl / q8:.2f}"
        served = "–" if row.path_difference is None else f"{row.path_difference:.1e}"
        lines.append(
            f"| {row.name} | {row.perplexity:.3f} | {row.kl:.5f} | {row.kl_error:.5f} | {share} | {row.kl_p99:.4f} "
            f"| {row.agreement:.2%} | {served} |"
        )
    return "\n".join(lines)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subject.add_arguments(parser)
    names = get_args(PrecisionOption)
    parser.add_argument("--precisions", type=_words, default=list(names), metavar="LIST", help=f"of {', '.join(names)}")
    parser.add_argument("--peers", type=_words, default=list(PEERS), metavar="LIST", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--text", type=Path, default=prompts.QUALITY_TEXT, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=0, metavar="N", help="of the text; 0: all")
    parser.add_argument("--mixed", action="store_true", help="the model with its channels in another order, in bf16")
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens that see each other (512)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE")
    parser.add_argument("--short", action="store_true", help="32 tokens, two precisions, no llama.cpp")
    args = subject.parse(parser, argv, SHORT)
    known: Mapping[str, Sequence[str]] = {"precisions": names, "peers": PEERS}
    for option, allowed in known.items():
        if unknown := set(getattr(args, option)) - set(allowed):
            parser.error(f"--{option}: {', '.join(sorted(unknown))} unknown; allowed are {', '.join(allowed)}")
    if args.precision is not None:
        args.precisions = [args.precision]
    if not args.precisions:
        parser.error("--precisions: needed is one at least")
    return args


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


if __name__ == "__main__":
    sys.exit(main())
