"""The plan of the house, read from the source: who may import whom, and what stands nowhere.

A room is a folder or a file right under `brlite/`. An import inside a function counts like any other. Add a room with
a line in `ALLOWED`; docs/architecture.md says the same in words.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "brlite"
MAX_LINES = 600
OLDEST_PYTHON = (3, 10)

# Room → what it may import: rooms or files of brlite, then third parties.
ALLOWED: dict[str, tuple[str, str]] = {
    "errors": ("", ""),
    "outputs": ("", "msgspec"),
    "sampling_params": ("errors", "msgspec"),
    "field_errors": ("errors", "msgspec"),
    "address": ("", ""),
    "config": ("text_file address errors field_errors seed_config", "msgspec tomli tomllib"),
    "seed_config": ("config errors field_errors", "msgspec"),
    "config_check": ("address config machine process errors", ""),
    "config_text": ("config", "msgspec"),
    "config_diff": ("config config_text field_errors", "msgspec"),
    "proxy_config": ("address config field_errors errors", "msgspec"),
    "machine": ("", ""),
    "children": ("", ""),
    "ownership": ("", ""),
    "temporary": ("", ""),
    "quoting": ("", ""),
    "text_file": ("", ""),
    "model_file": ("machine quoting text_file errors", ""),
    "cache": ("", ""),
    "process": ("errors", ""),
    "tokenizer": ("text_file model_file quoting checkpoint.gguf_header errors", "tokenizers sentencepiece jinja2"),
    "constraint": ("errors", "llguidance"),
    "engine": ("constraint tokenizer sampling_params outputs config errors", "msgspec"),
    "models": ("quoting errors config", "torch numpy msgspec"),
    "kernels": (
        "children ownership temporary model_file quoting models cache machine errors config",
        "numpy msgspec setuptools",
    ),
    "checkpoint": (
        "children temporary model_file quoting models cache errors config",
        "torch safetensors numpy gguf huggingface_hub tqdm msgspec",
    ),
    "worker": (
        "children ownership temporary quoting models kernels checkpoint cache machine engine.backend sampling_params "
        "outputs config errors",
        "torch numpy msgspec",
    ),
    "engines": (
        "engine.backend tokenizer worker checkpoint outputs config field_errors errors",
        "numpy msgspec",
    ),
    "http": ("children text_file config errors", "aiohttp msgspec multidict yarl"),
    "server": (
        "http engine tokenizer sampling_params outputs process config config_check errors",
        "aiohttp msgspec prometheus_client",
    ),
    "proxy": ("children quoting text_file http address config errors", "aiohttp msgspec prometheus_client"),
    "llm": ("engine engines worker checkpoint tokenizer sampling_params outputs config config_check errors", "msgspec"),
    "app": ("server proxy http llm engine config errors", "aiohttp"),
    "reload": ("server proxy http process config config_check config_diff errors", "msgspec"),
    "serve": (
        "app reload process config_check proxy llm checkpoint.fetch worker.sizes server http config errors",
        "msgspec",
    ),
    "ray_errors": ("http errors", "starlette"),
    "ray_serve": ("app llm http config config_check field_errors errors", "aiohttp msgspec ray starlette yarl"),
    "rank": ("worker errors", ""),
    "generate": ("text_file llm sampling_params outputs config errors", "msgspec tqdm"),
    "chat": ("process llm engine checkpoint.fetch sampling_params config errors", "aiohttp msgspec"),
    "check": (
        "config config_check config_text proxy_config machine checkpoint tokenizer models worker engines.discovery "
        "proxy http errors",
        "msgspec",
    ),
    "verify": ("llm engine machine tokenizer sampling_params outputs config config_check errors", "msgspec"),
    "engine_check": ("engines config config_check", "msgspec"),
    "conversion_cli": ("convert inspect_model errors", ""),
    "convert": ("checkpoint kernels.library models worker tokenizer machine seed_config config errors", "msgspec"),
    "inspect_model": ("checkpoint kernels.image models machine quoting errors", "gguf"),
    "doctor": ("config machine cache checkpoint.fetch kernels worker errors", ""),
}
MAY_IMPORT_ANYTHING = ("cli", "__main__")
MAY_BE_ASYNC = (
    "http",
    "server",
    "proxy",
    "engine.async_engine",
    "engine.fair_thread",
    "app",
    "llm",
    "reload",
    "serve",
    "ray_errors",
    "ray_serve",
    "chat",
)
ONLY_IN = {
    "prometheus_client": ("server.metrics", "proxy.metrics"),
    "setuptools": ("kernels.extension",),
}
DEVICE_KINDS = re.compile(r"\b(cuda|supa|nccl|gloo|bccl|sccl)\b")
DEVICE_MODULE = "worker.device"
DRAWERS = ("utils", "common", "core", "helpers", "misc")

FORBIDDEN_IMPORTS = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
FORBIDDEN_CALLS = ("eval", "exec", "__import__")
FORBIDDEN_ATTRIBUTES = ("torch.jit", "torch.compile", "asyncio.TaskGroup", "asyncio.timeout", "os.system")
FORBIDDEN_ARGUMENTS = ("trust_remote_code", "shell")

FILES = sorted(PACKAGE.rglob("*.py"))
NATIVE_FILES = sorted((*PACKAGE.rglob("*.cpp"), *PACKAGE.rglob("*.h")))


def module_name(path: Path) -> str:
    """`engine.scheduler` for `brlite/engine/scheduler.py`, `engine` for its `__init__`, "" for the package's own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def each_file(*, but: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    files = [path for path in FILES if module_name(path) not in but]
    return pytest.mark.parametrize("path", files, ids=lambda path: module_name(path) or "brlite")


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), feature_version=OLDEST_PYTHON)


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            submodules = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from submodules if node.module == "brlite" else (str(node.module),)


def is_within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def misplaced_imports(module: str, tree: ast.AST) -> Iterator[str]:
    room = module.split(".")[0]
    rooms, third_parties = (tuple(names.split()) for names in ALLOWED[room])
    for name in imports(tree):
        root, _, rest = name.partition(".")
        if root == "brlite":
            is_allowed = is_within(rest, (room, *rooms)) or rest in ("", "__version__")
        else:
            is_allowed = root in sys.stdlib_module_names or root in third_parties
        if not is_allowed or not is_within(module, ONLY_IN.get(root, (module,))):
            yield name


def forbidden(tree: ast.AST) -> Iterator[str]:
    yield from (name for name in imports(tree) if name.split(".")[0] in FORBIDDEN_IMPORTS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in FORBIDDEN_ATTRIBUTES:
            yield ast.unparse(node)
        if isinstance(node, ast.Call):
            yield from forbidden_in_call(node)


def forbidden_in_call(call: ast.Call) -> Iterator[str]:
    function = ast.unparse(call.func)
    arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if function in FORBIDDEN_CALLS:
        yield function
    if function == "torch.load" and arguments.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    yield from (f"{name}={arguments[name]}" for name in FORBIDDEN_ARGUMENTS if arguments.get(name, "False") != "False")


@each_file(but=("", *MAY_IMPORT_ANYTHING))
def test_a_room_imports_only_what_the_table_allows(path):
    assert list(misplaced_imports(module_name(path), parse(path))) == []


@each_file()
def test_nothing_dangerous_or_too_new_is_used(path):
    assert list(forbidden(parse(path))) == []


@each_file()
def test_a_file_says_what_it_is_and_fits_in_a_few_screens(path):
    assert ast.get_docstring(parse(path))
    assert path.read_bytes().count(b"\n") <= MAX_LINES
    assert path.stem not in DRAWERS


@pytest.mark.parametrize("path", NATIVE_FILES, ids=lambda path: path.name)
def test_a_native_file_fits_in_a_few_screens(path):
    assert path.read_bytes().count(b"\n") <= MAX_LINES


@each_file()
def test_only_the_edges_are_async(path):
    is_async = any(isinstance(node, ast.AsyncFunctionDef) for node in ast.walk(parse(path)))

    assert not is_async or is_within(module_name(path), MAY_BE_ASYNC)


@each_file(but=(DEVICE_MODULE,))
def test_only_the_device_module_names_accelerators(path):
    assert DEVICE_KINDS.search(path.read_text(encoding="utf-8")) is None


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine.scheduler", "import torch"),
        ("engine.scheduler", "from brlite.worker.sampler import sample"),
        ("engine.scheduler", "def lazily():\n    import aiohttp"),
        ("worker.sampler", "from brlite.engine.scheduler import Scheduler"),
        ("proxy.forward", "from brlite import server"),
        ("server.handlers", "import prometheus_client"),
    ],
)
def test_a_misplaced_import_is_found(module, source):
    assert list(misplaced_imports(module, ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec(code)",
        "load(path, trust_remote_code=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "subprocess.run(line, shell=True)",
        "torch.jit.load(path)",
        "torch.compile(model)",
        "async def f():\n    async with asyncio.TaskGroup() as group: ...",
    ],
)
def test_a_forbidden_thing_is_found(source):
    assert list(forbidden(ast.parse(source)))


@pytest.mark.parametrize("source", ["model.eval()", "torch.load(path, weights_only=True)", "re.compile(text)"])
def test_a_harmless_namesake_is_not_forbidden(source):
    assert list(forbidden(ast.parse(source))) == []


# Importing the first must not bring in the others.
LIGHT = [
    ("brlite", ("torch", "aiohttp", "transformers", "msgspec", "asyncio")),
    ("brlite.cli", ("torch", "aiohttp", "transformers", "msgspec", "asyncio")),
    ("brlite.config", ("torch", "aiohttp", "transformers", "asyncio")),
    ("brlite.engine.async_engine", ("torch", "aiohttp", "transformers", "tokenizers")),
    ("brlite.serve", ("torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy")),
    ("brlite.engines.toy", ("torch", "aiohttp", "transformers", "tokenizers", "jinja2", "asyncio")),
    ("brlite.engines.slot_backend", ("torch", "aiohttp", "transformers", "tokenizers", "jinja2")),
    ("brlite.llm", ("torch", "aiohttp", "transformers", "tokenizers")),
]


@pytest.mark.parametrize(("module", "heavy"), LIGHT, ids=[module for module, _ in LIGHT])
def test_an_import_brings_in_nothing_heavy(module, heavy):
    code = f"import sys, {module}; print(*sys.modules)"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert set(heavy).isdisjoint(result.stdout.split())
