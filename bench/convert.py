"""How fast a model becomes a bundle, against the disk; how much memory that takes; how quickly the bundle loads.

    python bench/shapes.py 1.1b /tmp/1.1b && python bench/convert.py /tmp/1.1b    # 3 rounds, some minutes
    python bench/convert.py FOLDER --precision bf16 --scratch /mnt/other           # another precision, another disk
    python bench/convert.py --short                                                # a tiny model, one round: for CI

In each round as many bytes as the bundle has are written to the same folder in one piece and forced to the disk, before
and after: a disk that others use is not equally fast twice. Both rates are of bytes that are on the disk at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec
import shapes
from measuring import this_machine

from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.bundle import read_manifest

CHUNK_BYTES = 4 * 2**20
NAME = "bench"
PRECISION = "a_bf16_w_int8_kv_int8"
LOAD = """
import sys, time
from pathlib import Path
from brlite.config.options import Config, EngineConfig, ModelSpec
from brlite.llm import build_engine
spec = ModelSpec(name="bench", path=sys.argv[1], precision=sys.argv[2], build_seq=128, build_batch=1)
began = time.monotonic()
backend = build_engine(Config(model=(spec,), engine=EngineConfig(backend="auto"))).backend
print(time.monotonic() - began, backend.info.name)
backend.close()
"""


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """Rates in bytes a second, of the disk before and after."""

    disk_before: float
    disk_after: float
    rate: float
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    load_seconds: float

    @property
    def share(self) -> float:
        return self.rate / median((self.disk_before, self.disk_after))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 if a conversion or a load fails."""
    args = _arguments(argv)
    with tempfile.TemporaryDirectory(prefix="brlite-bench-", dir=args.scratch) as scratch:
        if args.short:
            args.model = Path(scratch) / "tiny"
            shapes.write_shape("tiny", args.model)
        source = _Source(args.model)
        try:
            rounds = [_round(args, source, Path(scratch) / f"round{number}") for number in range(args.rounds)]
        except subprocess.CalledProcessError as error:
            print(f"convert: error: {' '.join(error.cmd[:3])} ended with status {error.returncode}", file=sys.stderr)
            return 2
    print(_render(rounds, source))
    if args.json is not None:
        result = {"machine": this_machine.describe(), "source": vars(source), "rounds": msgspec.to_builtins(rounds)}
        args.json.write_text(json.dumps(result, indent=1, default=str) + "\n")
    return 0


class _Source:
    """The model that is converted, read once, so that every round finds it in memory."""

    def __init__(self, path: Path) -> None:
        checkpoint = open_checkpoint(path)
        self.num_bytes = checkpoint.num_bytes
        self.largest = max(2 * math.prod(shape) for shape in checkpoint.shapes().values())  # as bfloat16


def _round(args: argparse.Namespace, source: _Source, folder: Path) -> Round:
    folder.mkdir()
    before = _disk_rate(folder / "before", source.num_bytes)
    seconds, usage = _convert(args, folder)
    bundle = folder / NAME
    num_bytes = sum(record.num_bytes for record in read_manifest(bundle).files.values())
    load_seconds = min(_load(bundle, args.precision) for _ in range(3))
    after = _disk_rate(folder / "after", source.num_bytes)
    shutil.rmtree(folder)
    return Round(
        disk_before=before,
        disk_after=after,
        rate=num_bytes / seconds,
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
        load_seconds=load_seconds,
    )


def _disk_rate(file: Path, num_bytes: int) -> float:
    """Bytes a second of one long write, forced to the disk."""
    chunk = os.urandom(CHUNK_BYTES)
    began = time.monotonic()
    with file.open("wb", buffering=0) as stream:
        for _ in range(max(1, num_bytes // CHUNK_BYTES)):
            stream.write(chunk)
        os.fsync(stream.fileno())
    seconds = time.monotonic() - began
    written = file.stat().st_size
    file.unlink()
    return written / seconds


def _convert(args: argparse.Namespace, folder: Path) -> tuple[float, resource.struct_rusage]:
    order = ["--model_name", NAME, "--model_dir", str(args.model), "--output_dir", str(folder)]
    command = [sys.executable, "-m", "brlite", "convert", *order, "--precision", args.precision]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return seconds, usage


def _load(bundle: Path, precision: str) -> float:
    """Seconds from a config to a model that can compute, in a process of its own."""
    command = [sys.executable, "-c", LOAD, str(bundle), precision]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, backend = done.stdout.split()
    if backend != "native":
        print(f"convert: {backend} loads the bundle: it maps nothing", file=sys.stderr)
    return float(seconds)


def _render(rounds: Sequence[Round], source: _Source) -> str:
    lines = [
        f"{source.num_bytes / 1e9:.2f} GB of weights, the largest tensor {source.largest / 1e6:.0f} MB in bfloat16",
        "",
        "| | disk before, MB/s | after | convert MB/s | of the disk | seconds | CPU seconds | peak MB | load s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, each in (*((str(number + 1), each) for number, each in enumerate(rounds)), ("median", _median(rounds))):
        lines.append(
            f"| {name} | {each.disk_before / 1e6:.0f} | {each.disk_after / 1e6:.0f} | {each.rate / 1e6:.0f} "
            f"| {each.share:.0%} | {each.seconds:.1f} | {each.cpu_seconds:.1f} | {each.peak_bytes / 1e6:.0f} "
            f"| {each.load_seconds:.2f} |"
        )
    return "\n".join(lines)


def _median(rounds: Sequence[Round]) -> Round:
    """Of each number by itself."""
    names = Round.__struct_fields__
    return Round(**{name: median(getattr(each, name) for each in rounds) for name in names})


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a model's folder")
    parser.add_argument("--precision", default=PRECISION, help=f"of the packed weights ({PRECISION})")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(3)")
    parser.add_argument("--scratch", type=Path, metavar="FOLDER", help="where to write (the system's temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE")
    parser.add_argument("--short", action="store_true", help="a tiny model, for CI")
    args = parser.parse_args(argv)
    if args.short:
        args.rounds = 1
    elif args.model is None:
        parser.error("needed is a model's folder")
    return args


if __name__ == "__main__":
    sys.exit(main())
