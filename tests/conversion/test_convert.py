"""`brlite convert` from its command line to a model that answers; whatever is wrong is one line and status 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from brlite.backends.native.packed_file import read_packed_file_key
from brlite.checkpoint import open_checkpoint
from brlite.checkpoint.bundle import MANIFEST_FILE, PROGRESS_FILE, packed_name, read_manifest
from brlite.commands.cli import main, model_convert
from brlite.config.load import load_config
from brlite.config.warnings import config_warnings
from brlite.conversion.convert import model_name
from brlite.conversion.safetensors_writer import PlannedTensor, shard_header
from brlite.errors import ConfigError
from brlite.llm import LLM
from brlite.models.families.llama import LLAMA as FAMILY
from brlite.models.precision import PRECISIONS
from brlite.sampling_params import SamplingParams
from tests.config.test_manual_json import FIXTURES
from tests.limits import PATIENCE_SECONDS
from tests.load_plans import read_tensors
from tests.quantized_folders import awq, write_folder
from tests.tiny_models import LLAMA, VOCAB_SIZE, random_tensors, tiny_tensors, write_byte_tokenizer, write_tiny_model
from tests.traced_models import write_traced

ROOT = Path(__file__).parents[2]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LINE = re.compile(r"brlite: error: [^\n]+\n")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = write_tiny_model(tmp_path / "source")
    write_byte_tokenizer(folder)
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code of a model was run')")
    return folder


def convert(source: Path, out: Path, *more: str, name: str = "someone/tiny") -> int:
    return main(["convert", "--model_name", name, "--model_dir", str(source), "--output_dir", str(out), *more])


def printed_config(text: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(text[text.index("\n{") :])
    return config


def answers(config: dict[str, Any], folder: Path) -> list[str]:
    path = folder / "config_of_the_test.json"
    path.write_text(json.dumps(config))
    with LLM(config_path=path) as llm:
        return [output.outputs[0].text for output in llm.generate(["The sea", "is"], GREEDY)]


def test_what_it_prints_is_what_is_there(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status = convert(source, tmp_path / "out")

    text = capsys.readouterr().out
    bundle = tmp_path / "out" / "someone--tiny"
    manifest = read_manifest(bundle)
    assert status == 0
    assert [line[:2] for line in text.splitlines()[:11]] == [f"{number:2}" for number in range(1, 12)]
    assert {*manifest.files, MANIFEST_FILE} == {file.name for file in bundle.iterdir()}
    assert all(f"{record.num_bytes:>14}  {record.sha256}" in text for record in manifest.files.values())
    assert "modeling_tiny.py" not in manifest.files
    config = printed_config(text)
    assert (config["input_name"], config["output_name"], config["vocab_size"]) == ("input_ids.1", "logits", VOCAB_SIZE)
    assert len(config) == 13
    monkeypatch.chdir(tmp_path)
    Path("printed.json").write_text(json.dumps(config))
    assert config_warnings(load_config(Path("printed.json"))) == []
    assert main(["check", "printed.json"]) == 0


def test_a_bundle_answers_as_its_source_does(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(source, tmp_path / "out")
    config = printed_config(capsys.readouterr().out)

    found = answers(config, tmp_path)

    assert found == answers(config | {"cached_dir": str(source), "model_file": ""}, tmp_path)


def test_the_manuals_command_takes_its_three_flags(source: Path, tmp_path: Path) -> None:
    name = "models--someone--tiny"

    status = model_convert([f"--model_name={name}", f"--model-dir={source}", f"--output-dir={tmp_path / 'out'}"])

    assert status == 0
    assert read_manifest(tmp_path / "out" / "someone--tiny").model == "someone/tiny"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("models--Qwen--Qwen2-72B", "Qwen/Qwen2-72B"),
        ("models--a--b--c", "a/b--c"),
        ("Qwen/Qwen2-72B", "Qwen/Qwen2-72B"),
        ("qwen2_72b", "qwen2_72b"),
        ("models--gpt2", "models--gpt2"),
        ("../../etc", None),
        ("", None),
    ],
)
def test_names_of_the_hubs_folders_are_understood(text: str, name: str | None) -> None:
    if name is not None:
        assert model_name(text) == name
        return
    with pytest.raises(ConfigError, match=r"--model_name: .* is not a model name"):
        model_name(text)


def test_a_second_run_says_up_to_date_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(source, tmp_path / "out")
    first = printed_config(capsys.readouterr().out)
    before = states(tmp_path / "out")

    status = convert(source, tmp_path / "out")

    text = capsys.readouterr().out
    assert status == 0
    assert "is up to date" in text
    assert printed_config(text) == first
    assert states(tmp_path / "out") == before


def states(folder: Path) -> dict[Path, tuple[int, int, int]]:
    return {
        file: (status.st_ino, status.st_size, status.st_mtime_ns)
        for file in folder.rglob("*")
        for status in (file.stat(),)
    }


def test_a_new_tokenizer_is_taken_over_without_touching_the_weights(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out")
    bundle = tmp_path / "out" / "someone--tiny"
    before = {file: file.stat().st_ino for file in bundle.glob("*.safetensors")}
    (source / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')

    convert(source, tmp_path / "out")

    assert (bundle / "tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    assert {file: file.stat().st_ino for file in bundle.glob("*.safetensors")} == before


def traced_folder(tmp_path: Path, **changes: Any) -> tuple[Path, Path]:
    """A folder without weights, and the traced file that has them."""
    folder = tmp_path / "traced"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA | changes))
    write_byte_tokenizer(folder)
    return folder, write_traced(tmp_path / "tiny.pt", random_tensors(LLAMA | changes))


@pytest.mark.parametrize("tied", [False, True])
def test_a_traced_file_becomes_a_bundle_with_its_names(
    tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, traced = traced_folder(tmp_path, tie_word_embeddings=tied)

    status = convert(folder, tmp_path / "out", "--from-pt", str(traced))

    config = printed_config(capsys.readouterr().out)
    assert status == 0
    assert config["input_name"] == "input_ids.1"
    assert config["output_name"] == "logits"
    expected = config | {"cached_dir": str(folder), "model_file": str(traced)}
    assert answers(config, tmp_path) == answers(expected, tmp_path)


def test_texts_of_the_files_move_no_cursor_of_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, traced = traced_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "\x1b[2J\n" + "x" * 10_000}))
    hostile = tmp_path / "hostile.pt"
    with zipfile.ZipFile(traced) as read, zipfile.ZipFile(hostile, "w") as written:
        for info in read.infolist():
            data = read.read(info)
            written.writestr(info.filename, data.replace(b'"logits"', rb'"\x1b]0;owned\x07"'))

    status = convert(folder, tmp_path / "out", "--from-pt", str(hostile))

    text = capsys.readouterr().out
    assert status == 0
    assert all(line.isprintable() and len(line) < 400 for line in text.splitlines())
    assert "\\x1b]0;owned\\x07" in text


def test_a_traced_file_serves_as_it_is_where_there_are_no_other_weights(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(source, tmp_path / "out")
    config = printed_config(capsys.readouterr().out)
    folder, traced = traced_folder(tmp_path)
    write_traced(traced, tiny_tensors("llama"))
    beside = folder / "beside.pt"
    traced.rename(beside)

    found = [
        answers(config | {"cached_dir": cached_dir, "model_file": str(beside)}, tmp_path)
        for cached_dir in (str(folder), "")
    ]

    assert found == [answers(config, tmp_path)] * 2


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.json")), ids=lambda path: path.stem)
def test_the_manuals_configs_serve_a_bundle_under_the_names_that_they_have(
    path: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    convert(source, tmp_path, name=config["model"])
    bundle = str(tmp_path / config["model"].replace("/", "--"))
    own = {"model_file": bundle, "serialize_file": "", "vocab_size": VOCAB_SIZE, "build_seq": 64, "build_batch": 2}
    alone = {"distribute_param": [1, 1, 1], "devices": [0]}
    adapted = tmp_path / "adapted.json"
    adapted.write_text(json.dumps(config | own | alone))
    capsys.readouterr()

    status = main(["check", str(adapted)])

    text = capsys.readouterr().out
    assert status == 0
    assert f'output_name = "{config["output_name"]}"' in text
    assert f"from      {bundle}" in text
    assert len(answers(config | own | alone, tmp_path)) == 2


def test_the_config_is_written_beside_the_bundle_and_one_that_is_there_is_kept(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out" / "someone--tiny.json"
    convert(source, tmp_path / "out")
    printed = capsys.readouterr().out

    assert f"is in {file}:" in printed
    assert json.loads(file.read_text()) == printed_config(printed)
    file.write_text('{"mine": true}')
    convert(source, tmp_path / "out")

    assert file.read_text() == '{"mine": true}'
    assert "is there already and is kept" in capsys.readouterr().out


def test_a_bundle_can_be_converted_again(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(source, tmp_path / "out")
    convert(tmp_path / "out" / "someone--tiny", tmp_path / "again")

    first, second = (read_manifest(tmp_path / folder / "someone--tiny").files for folder in ("out", "again"))
    assert first == second
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("is_folder_linked", [True, False])
def test_a_bundle_is_not_converted_onto_itself(
    is_folder_linked: bool, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its shards would be removed before they are read."""
    convert(source, tmp_path / "out")
    bundle, link = tmp_path / "out" / "someone--tiny", tmp_path / "link"
    before = sorted(bundle.iterdir())
    if is_folder_linked:
        link.symlink_to(bundle)
    else:
        link.mkdir()
        for file in before:
            (link / file.name).symlink_to(file)

    assert convert(link, tmp_path / "out") == 2

    assert "someone--tiny: is what is to be converted; name another" in capsys.readouterr().err
    assert sorted(bundle.iterdir()) == before


@pytest.mark.model
def test_a_real_model_from_gguf_says_the_same(
    smollm2_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(smollm2_path, tmp_path, "--precision", "a_bf16_w_int8")
    printed = capsys.readouterr().out
    config = printed_config(printed)
    short = config | {"build_seq": 128, "build_batch": 2}

    found = answers(short, tmp_path)

    assert "Q4_1, Q8_0 are widened: serve the model itself to keep its size" in printed
    assert found == answers(short | {"cached_dir": "", "model_file": str(smollm2_path)}, tmp_path)
    assert (tmp_path / "someone--tiny" / "tokenizer.json").is_file()
    assert not (tmp_path / "someone--tiny" / "vocabulary.gguf").exists()
    checkpoint = open_checkpoint(tmp_path / "someone--tiny")
    image = checkpoint.path / packed_name(PRECISIONS["a_bf16_w_int8"])
    assert checkpoint.identity == read_packed_file_key(image).identity


def no_tokenizer(source: Path) -> None:
    (source / "tokenizer.json").unlink()


def other_config(**changes: Any) -> Callable[[Path], object]:
    return lambda source: (source / "config.json").write_text(json.dumps(LLAMA | changes))


def sharded(source: Path, weight_map: dict[str, str]) -> None:
    (source / "model.safetensors").rename(source / "model-00001-of-00001.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda source: (source / "config.json").unlink(), "config.json: the file is missing"),
        (lambda source: (source / "config.json").write_text("{"), "config.json: not readable as JSON"),
        (lambda source: (source / "model.safetensors").unlink(), "no weights"),
        (lambda source: os.truncate(source / "model.safetensors", 5000), "must be .* bytes long by its header"),
        (lambda source: os.truncate(source / "model.safetensors", 90000), "must be .* bytes long by its header"),
        (lambda source: (source / "model.safetensors").write_bytes(b"\xff" * 50), "truncated or not safetensors"),
        (
            lambda source: sharded(source, {"a": "absent.safetensors"}),
            "1 of 1 shards are missing, the first is .*absent",
        ),
        (lambda source: sharded(source, {"a": "../x.safetensors"}), "must be the name of a file beside"),
        (other_config(num_hidden_layers=4), "missing"),
        (other_config(num_hidden_layers=2), "not expected in a llama model"),
        (other_config(intermediate_size=97), "has shape .* the config wants"),
        (other_config(architectures=["GPT2LMHeadModel"]), "'GPT2LMHeadModel' is not supported"),
        (other_config(quantization_config={"quant_method": "awq"}), "quantization_config"),
        (no_tokenizer, "no tokenizer.json"),
        (lambda source: (source / "tokenizer.json").write_text("{}"), "tokenizer"),
    ],
)
def test_a_broken_source_is_one_line_and_nothing_is_written(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], break_it: Callable[[Path], object], words: str
) -> None:
    break_it(source)

    status = convert(source, tmp_path / "out")

    said = capsys.readouterr().err
    assert status == 2
    assert LINE.fullmatch(said)
    assert re.search(words, said)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_beyond_the_vocabulary_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    small = LLAMA | {"vocab_size": 100}
    (source / "config.json").write_text(json.dumps(small))
    save_file(random_tensors(small), source / "model.safetensors")
    write_byte_tokenizer(source)

    assert convert(source, tmp_path / "out") == 2
    assert "its tokenizer has token ids up to 258, the model 100 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prepare", "arguments", "words"),
    [
        (lambda out: None, ["--tp", "2"], "--tp 2: allowed is 1"),
        (lambda out: out.write_text(""), [], "must be a folder that can be written to"),
        (lambda out: fill(out / "someone--tiny" / "thesis.tex", ""), [], "is there already and no bundle"),
        (lambda out: fill(out / "someone--tiny" / MANIFEST_FILE, "{"), [], "not the manifest of a bundle"),
        (lambda out: fill(out / "someone--tiny" / PROGRESS_FILE, "{"), [], "not the manifest of a bundle"),
        (lambda out: None, ["--from-pt", "absent.pt"], "absent.pt: the file is missing"),
        (lambda out: None, ["--from-pt", __file__], "not a traced .pt file, or cut short"),
    ],
)
def test_an_order_that_cannot_be_carried_out_is_one_line(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prepare: Callable[[Path], object],
    arguments: list[str],
    words: str,
) -> None:
    prepare(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))

    status = convert(source, tmp_path / "out", *arguments)

    said = capsys.readouterr().err
    assert status == 2
    assert LINE.fullmatch(said)
    assert words in said
    assert sorted(tmp_path.rglob("*")) == before


def fill(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(text)


def test_a_bundle_of_another_model_is_not_replaced(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(source, tmp_path, name="someone/tiny")
    (tmp_path / "someone--tiny").rename(tmp_path / "someone--other")

    status = convert(source, tmp_path, name="someone/other")

    assert status == 2
    assert "holds a bundle of someone/tiny, not of someone/other" in capsys.readouterr().err


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from brlite.commands.cli import main
sys.exit(main(sys.argv[2:]))
"""


# No file may become so long: the system then answers as a full disk does, with an error of the write. The second is
# enough for the one shard, in bfloat16, but not for the packed weights in bfloat16.
@pytest.mark.parametrize("most", [100, 100_000, 240_000])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(source: Path, tmp_path: Path, most: int) -> None:
    order = ["--model_name", "tiny", "--model_dir", str(source), "--output_dir", str(tmp_path), "--precision", "bf16"]
    # -B: a module that is compiled now would be cut at that length too, and kept so for later imports.
    arguments = [sys.executable, "-B", "-c", FULL_DISK, str(most), "convert", *order]

    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)

    assert done.returncode == 2
    assert LINE.fullmatch(done.stderr), done.stderr
    assert "cannot be written" in done.stderr
    left = {file.name: file.stat().st_size for file in (tmp_path / "tiny").iterdir()}
    assert left.keys() <= {PROGRESS_FILE, "model-00001-of-00001.safetensors"}
    assert main(["convert", *order]) == 0
    assert (tmp_path / "tiny" / packed_name(PRECISIONS["bf16"])).is_file()


MEASURED = """
import sys
from brlite.commands.cli import main
status = main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", int(peak.split()[1]) * 1024, file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_is_that_of_the_largest_tensor_and_little_else(tmp_path: Path) -> None:
    source, largest = write_large(tmp_path / "source"), 2 * 32768 * 1024
    assert (source / "model.safetensors").stat().st_size > 300 * 10**6
    order = ["--model_name", "large", "--model_dir", str(source), "--output_dir", str(tmp_path)]

    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "convert", *order],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )

    assert done.returncode == 0, done.stderr
    peak = int(done.stderr.rsplit("peak ", 1)[1])
    assert peak < largest + 300 * 10**6


def write_large(folder: Path) -> Path:
    """300 MB of weights; what they are does not matter."""
    sizes = {"vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
    config = LLAMA | sizes
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_byte_tokenizer(folder)
    places = FAMILY.weight_targets(FAMILY.read_config(config))
    planned = tuple(PlannedTensor(name, "BF16", place.shape) for name, place in places.items())
    numbers = (torch.randn(1 << 20) * 0.02).bfloat16().view(torch.uint16).numpy()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(shard_header(planned))
        for tensor in planned:
            stream.write(np.resize(numbers, tensor.num_bytes // 2).tobytes())
    return folder


def test_a_quantized_folder_becomes_a_plain_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = write_folder(tmp_path / "m", awq())
    write_byte_tokenizer(tmp_path / "m")

    status = convert(tmp_path / "m", tmp_path / "out")

    assert status == 0
    assert "AWQ 4-bit with zero points are widened: serve the model itself" in capsys.readouterr().out
    (manifest,) = (tmp_path / "out").rglob("brlite-manifest.json")
    bundle = open_checkpoint(manifest.parent)
    found = read_tensors(bundle)
    assert found.keys() == expected.keys()
    assert all(np.abs(found[name] - expected[name]).max() <= np.abs(expected[name]).max() / 256 for name in expected)
