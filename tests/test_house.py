"""The plan of the house, read from the source: who may import whom, and what stands nowhere.

A room is a folder or a file right under `brlite/`. An import inside a function counts like any other. Add a room with
a line in `ALLOWED`; docs/architecture.md says the same in words.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

import brlite

PACKAGE = Path(__file__).parent.parent / "brlite"
MAX_LINES = 600
MAX_ROOMS, MAX_LEVELS, MAX_ARROWS = 22, 12, 110
MAX_SHARE_USED_ONCE = 0.12  # 1 to 9 % in nano-vllm, mini-sglang, gpt-fast, uvicorn, httpx and starlette
MAX_SHORT_FILES, SHORT_FILE_LINES = 10, 40
OLDEST_PYTHON = (3, 10)

# Room → what it may import: rooms or files of brlite (errors always), then third parties.
ALLOWED: dict[str, tuple[str, str]] = {
    "errors": ("", ""),
    "sampling_params": ("", "msgspec"),
    "files": ("", "msgspec"),
    "process": ("", ""),
    "config": ("files process models.precision", "msgspec tomli tomllib"),
    "models": ("files", "numpy msgspec"),
    "chat": ("files process", "tokenizers jinja2 msgspec"),
    "tokenizer": ("chat files process checkpoint.gguf_header checkpoint.model_file", "tokenizers"),
    "grammar": ("tokenizer sampling_params config", "llguidance numpy msgspec"),
    "engine": ("tokenizer grammar sampling_params config", "msgspec"),
    "checkpoint": (
        "models files process config",
        "torch numpy gguf huggingface_hub filelock tqdm msgspec",
    ),
    "backends": (
        "engine.backend engine.outputs models checkpoint tokenizer chat sampling_params config files process",
        "torch triton numpy msgspec setuptools",
    ),
    "conversion": ("models checkpoint backends tokenizer files process config", "numpy msgspec"),
    "dialects": ("chat.tools sampling_params config files", "msgspec"),
    "http": ("dialects.errors config files process", "aiohttp msgspec multidict yarl"),
    "server": (
        "http dialects chat engine tokenizer sampling_params config process",
        "aiohttp msgspec prometheus_client",
    ),
    "proxy": ("http dialects config files process", "aiohttp msgspec prometheus_client"),
    "llm": ("engine backends checkpoint tokenizer sampling_params config process", "msgspec"),
    "app": ("server proxy http engine llm config", "aiohttp"),
    "ray_serve": ("app llm http dialects config", "aiohttp msgspec ray starlette yarl"),
}
MAY_IMPORT_ANYTHING = ("commands", "__main__")
MAY_BE_ASYNC = (
    "http",
    "server",
    "proxy",
    "engine.async_engine",
    "engine.fair_thread",
    "engine.prompt_encoder",
    "process.waiting",
    "app",
    "llm",
    "ray_serve",
    "commands",
)
ONLY_IN = {
    "prometheus_client": ("server.metrics", "proxy.metrics"),
    "torch": ("backends.torch", "checkpoint.bin_checkpoint"),
    "triton": ("backends.torch.triton",),
    "jinja2": ("chat.template_worker",),
    "llguidance": ("grammar",),
    "setuptools": ("backends.native.extension", "commands.shared_files"),
}
DEVICE_KINDS = re.compile(r"\b(cuda|supa|xpu|mps|nccl|gloo|bccl|sccl|xccl)\b")
DEVICE_MODULE = "backends.torch.device"
GRAPH_MODULE = "backends.torch.triton.steps"  # a captured step is of CUDA alone
OPTION_TEXTS = "config.options"  # where people are told what the option `device` may be
DRAWERS = ("utils", "common", "core", "helpers", "misc")

FORBIDDEN_IMPORTS = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
FORBIDDEN_CALLS = ("eval", "exec", "__import__")
FORBIDDEN_ATTRIBUTES = (
    "torch.jit",
    "torch.compile",
    "asyncio.TaskGroup",
    "asyncio.timeout",
    "asyncio.wait_for",  # before Python 3.12 it may lose a cancellation: process.waiting.within does not
    "os.system",
)
FORBIDDEN_ARGUMENTS = ("trust_remote_code", "shell")

FILES = sorted(PACKAGE.rglob("*.py"))
NATIVE_FILES = sorted((*PACKAGE.rglob("*.cpp"), *PACKAGE.rglob("*.h")))


def module_name(path: Path) -> str:
    """`engine.scheduler` for `brlite/engine/scheduler.py`, `engine` for its `__init__`, "" for the package's own."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@cache
def trees() -> dict[str, ast.Module]:
    """Module → its source, parsed."""
    texts = {module_name(path): path.read_text(encoding="utf-8") for path in FILES}
    return {module: ast.parse(text, feature_version=OLDEST_PYTHON) for module, text in texts.items()}


def where(find: Callable[[str, ast.Module], Iterable[str]], *, but: tuple[str, ...] = ()) -> dict[str, list[str]]:
    """What is found in each module, of those where something is."""
    found = {name: list(find(name, tree)) for name, tree in trees().items() if not is_within(name, but)}
    return {name: things for name, things in found.items() if things}


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
            is_allowed = is_within(rest, (room, "errors", *rooms)) or rest in ("", "__version__")
        else:
            is_allowed = root in sys.stdlib_module_names or root in third_parties
        if not is_allowed or not is_within(module, ONLY_IN.get(root, (module,))):
            yield name


def forbidden(tree: ast.AST) -> Iterator[str]:
    yield from (name for name in imports(tree) if name.split(".")[0] in FORBIDDEN_IMPORTS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield from {f"{node.value.id}.{node.attr}"} & {*FORBIDDEN_ATTRIBUTES}
        if isinstance(node, ast.Call):
            yield from forbidden_in_call(node)


def forbidden_in_call(call: ast.Call) -> Iterator[str]:
    function = ast.unparse(call.func)
    asked = ("weights_only", *FORBIDDEN_ARGUMENTS)
    arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg in asked}
    if function in FORBIDDEN_CALLS:
        yield function
    if function == "torch.load" and arguments.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    yield from (f"{name}={arguments[name]}" for name in FORBIDDEN_ARGUMENTS if arguments.get(name, "False") != "False")


def test_a_room_imports_only_what_the_table_allows():
    assert where(misplaced_imports, but=("", *MAY_IMPORT_ANYTHING)) == {}


@cache
def file_imports() -> dict[str, set[str]]:
    """The files that each file imports, for types and inside functions too. The package's own `__init__` is left out:
    its names are lazy, and files read only its version."""
    named = {module: {*imports(tree), *imported_names(tree)} for module, tree in trees().items() if module}
    return {module: {name.removeprefix("brlite.") for name in names} & named.keys() for module, names in named.items()}


def imported_names(tree: ast.AST) -> Iterator[str]:
    """`brlite.a.b.c` for each `from brlite.a.b import c`: c may be a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("brlite."):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def loops(arrows: Mapping[str, set[str]]) -> list[str]:
    """The names that can be reached from themselves."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(arrows.get(start, ()))
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += arrows.get(name, ())
        return seen

    return sorted(name for name in arrows if name in reachable(name))


def test_no_imports_close_a_loop_between_files():
    assert loops({module: names - {module} for module, names in file_imports().items()}) == []


def test_rooms_are_few_and_close_no_loop():
    arrows: dict[str, set[str]] = {}
    for module, names in file_imports().items():
        room = module.split(".")[0]
        arrows.setdefault(room, set()).update(name.split(".")[0] for name in names)
    arrows = {room: names - {room} for room, names in arrows.items()}

    def level(room: str) -> int:
        return 1 + max(map(level, arrows[room]), default=0)

    assert loops(arrows) == []
    assert len(arrows) <= MAX_ROOMS
    assert max(map(level, arrows)) <= MAX_LEVELS
    assert sum(map(len, arrows.values())) <= MAX_ARROWS


def test_few_files_stand_at_the_root():
    assert len(list(PACKAGE.glob("*.py"))) <= 10


@pytest.mark.parametrize("other", ["torch", "native"])
def test_native_and_torch_do_not_import_each_other(other):
    room = {"torch": "backends.native", "native": "backends.torch"}[other]
    named = {name for module, names in file_imports().items() if is_within(module, (room,)) for name in names}

    assert [name for name in named if is_within(name, (f"backends.{other}",))] == []


def test_nothing_dangerous_or_too_new_is_used():
    assert where(lambda module, tree: forbidden(tree)) == {}


def test_a_class_name_is_used_once():
    names = Counter(node.name for tree in trees().values() for node in tree.body if isinstance(node, ast.ClassDef))

    assert [name for name, count in names.items() if count > 1] == []


def test_few_private_functions_are_used_once():
    """A helper that only names its line is inlined. Callbacks and entries of tables are used once, too."""
    num_functions, used_once = 0, []
    for module, tree in trees().items():
        nodes = list(ast.walk(tree))
        uses = Counter(node.id for node in nodes if isinstance(node, ast.Name))
        uses.update(node.attr for node in nodes if isinstance(node, ast.Attribute))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        num_functions += len(functions)
        used_once += [
            f"{module}.{function.name}"
            for function in functions
            if re.match("_[^_]", function.name) and uses[function.name] <= 1 and not function.decorator_list
        ]

    assert len(used_once) <= MAX_SHARE_USED_ONCE * num_functions, used_once


def test_few_files_are_short():
    """A file under 40 lines is a paragraph of another one, unless it is an entry or translates one family's names."""
    lengths = {module_name(path): path.read_bytes().count(b"\n") for path in FILES if not path.stem.startswith("__")}
    short = [name for name, length in lengths.items() if length < SHORT_FILE_LINES and "families" not in name]

    assert len(short) <= MAX_SHORT_FILES, short


def test_a_file_says_what_it_is_and_fits_in_a_few_screens():
    assert [module for module, tree in trees().items() if not ast.get_docstring(tree)] == []
    assert [path for path in (*FILES, *NATIVE_FILES) if path.read_bytes().count(b"\n") > MAX_LINES] == []
    assert [path for path in FILES if path.stem in DRAWERS] == []


def test_only_the_edges_are_async():
    def coroutines(module: str, tree: ast.Module) -> Iterator[str]:
        return (node.name for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef))

    assert where(coroutines, but=MAY_BE_ASYNC) == {}


def test_only_the_device_module_names_accelerators():
    texts = {module_name(path): path.read_text(encoding="utf-8") for path in FILES}
    named = {module for module, text in texts.items() if DEVICE_KINDS.search(text)}

    assert named <= {DEVICE_MODULE, GRAPH_MODULE, OPTION_TEXTS}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine.scheduler", "import torch"),
        ("engine.scheduler", "from brlite.backends.torch.candidates import TorchRows"),
        ("engine.scheduler", "def lazily():\n    import aiohttp"),
        ("backends.torch.candidates", "from brlite.engine.scheduler import Scheduler"),
        ("proxy.forwarder", "from brlite import server"),
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
        "async def f():\n    await asyncio.wait_for(event.wait(), 1)",
    ],
)
def test_a_forbidden_thing_is_found(source):
    assert list(forbidden(ast.parse(source)))


@pytest.mark.parametrize("source", ["model.eval()", "torch.load(path, weights_only=True)", "re.compile(text)"])
def test_a_harmless_namesake_is_not_forbidden(source):
    assert list(forbidden(ast.parse(source))) == []


@pytest.mark.parametrize("name", brlite.__all__)
def test_a_public_name_is_there(name):
    assert getattr(brlite, name).__module__.startswith("brlite.")


# Importing the first must not bring in the others.
LIGHT = [
    ("brlite", ("torch", "aiohttp", "transformers", "msgspec", "asyncio")),
    ("brlite.commands.cli", ("torch", "aiohttp", "transformers", "msgspec", "asyncio")),
    ("brlite.config.options", ("torch", "aiohttp", "transformers", "asyncio")),
    ("brlite.engine.async_engine", ("torch", "aiohttp", "transformers", "tokenizers")),
    ("brlite.commands.generate", ("torch", "aiohttp", "transformers", "tokenizers", "numpy")),
    ("brlite.commands.serve", ("torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy")),
    ("brlite.backends.plugins.toy", ("torch", "aiohttp", "transformers", "tokenizers", "jinja2", "asyncio")),
    ("brlite.backends.plugins.slot_backend", ("torch", "aiohttp", "transformers", "tokenizers", "jinja2")),
    ("brlite.llm", ("torch", "aiohttp", "transformers", "tokenizers")),
]


@pytest.mark.parametrize(("module", "heavy"), LIGHT, ids=[module for module, _ in LIGHT])
def test_an_import_brings_in_nothing_heavy(module, heavy):
    code = f"import sys, {module}; print(*sys.modules)"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert set(heavy).isdisjoint(result.stdout.split())


def test_a_server_of_an_engine_plugin_imports_nothing_that_it_does_not_use():
    code = """
import asyncio, sys
from brlite.commands.serve import ModelLoader
from brlite.config.options import Config, EngineConfig, ModelSpec

async def load():
    loader = ModelLoader(Config(model=(ModelSpec(name="m"),), engine=EngineConfig(name="toy")))
    await (await loader.load(ModelSpec(name="m"), print)).close()
    print(*sys.modules)

asyncio.run(load())
"""

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    unused = {"torch", "tqdm", "huggingface_hub", "transformers", "tokenizers", "jinja2", "sentencepiece", "gguf"}
    unused |= {"llguidance", "brlite.backends.sizes", "brlite.checkpoint.fetch", "brlite.conversion"}
    unused |= {"brlite.grammar.library", "brlite.server.openapi", "importlib.metadata", "tomllib"}
    assert unused.isdisjoint(result.stdout.split())
