"""The arguments of every command. The command itself is `run` in the file of its name.

Imports no package but brlite: `brlite --help` must not wait for aiohttp, and a build makes the man page from this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from brlite.models.precision import PrecisionName

SHELLS = ("bash", "zsh")
HOW = 'as in: eval "$(brlite completion bash)", or into a file that the shell reads'


def word(text: str) -> str:
    """A name, path or URL. Raises `ArgumentTypeError` for a blank one, such as that of a variable that is not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text


def file_path(text: str) -> Path:
    """A path. A blank one raises as in `word`: `Path("")` is this folder."""
    return Path(word(text))


def add_serve(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    about = "additional name for the model in requests; may be given several times"
    parser.add_argument("--alias", action="append", type=word, metavar="NAME", help=about)
    add_listening(parser)


def add_br_api_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", "--config_path", type=file_path, required=True, metavar="FILE", help="the config")
    parser.add_argument("--host", help="address to listen to (default: the TOML's; for a JSON, all)")
    parser.add_argument("--port", type=int, metavar="N", help="port to listen to")
    add_engine(parser)
    parser.set_defaults(model=None, is_server=True, is_manual=True)


def add_run(parser: argparse.ArgumentParser) -> None:
    name = "a model: organisation/model[:QUANT][@revision], a folder or a .gguf file (default: a small English model)"
    parser.add_argument("name", type=word, nargs="?", metavar="NAME", help=name)
    port = "port of the server on this machine (default 8000 if it is free, else any)"
    parser.add_argument("--port", type=int, metavar="N", help=port)
    parser.add_argument("--context", type=int, metavar="N", help="maximum context in tokens, prompt plus answer")
    add_device(parser)
    parser.add_argument("--engine", type=word, metavar="NAME", help="engine: auto, native, torch, or toy")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_sampling(parser, max_tokens=None)
    parser.set_defaults(logs_from="warning")


def add_proxy(parser: argparse.ArgumentParser) -> None:
    about = "a .toml with [[upstream]] tables; or br-vllm-serving's .json files, whose all_models lists are merged"
    parser.add_argument("config", type=file_path, nargs="*", metavar="CONFIG", help=about)
    upstream = "a model and its server, such as http://127.0.0.1:8001; the same name again adds a replica"
    parser.add_argument("--upstream", action="append", default=[], metavar="NAME=URL", help=upstream)
    parser.add_argument(
        "--choice", metavar="HOW", help="how to choose among replicas: least_loaded, round_robin, prefix or sticky"
    )
    add_listening(parser)


def add_chat(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--url", type=word, help="chat with this server, such as http://127.0.0.1:8000, instead of loading a model"
    )
    add_api_key(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_sampling(parser, max_tokens=None)
    parser.set_defaults(logs_from="warning")


def add_generate(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    source = 'prompts, one per line, or JSON lines {"prompt": …} with any sampling fields; - is standard input'
    parser.add_argument("--input", type=word, default="-", metavar="FILE", help=source)
    target = "file for the answers, as JSON lines; - is standard output"
    parser.add_argument("--output", type=word, default="-", metavar="FILE", help=target)
    parser.add_argument("--chat", action="store_true", help="send each prompt as a user's message, for a chat model")
    add_sampling(parser, max_tokens=256)
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the most probable tokens whose probabilities add up to P"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most probable tokens")
    parser.add_argument("--seed", type=int, metavar="N", help="random seed: the same seed gives the same answers")
    parser.add_argument("--n", type=int, metavar="N", help="number of answers per prompt")
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="text that ends an answer; may be given several times"
    )
    parser.set_defaults(prints_data=True, logs_from="warning")


def add_pull(parser: argparse.ArgumentParser) -> None:
    about = "organisation/model[:QUANT][@revision]; the prefix modelscope: chooses that hub (docs/models.md)"
    parser.add_argument("name", type=word, metavar="NAME", help=about)
    parser.set_defaults(command="models", action="pull", logs_from="warning")


def add_models(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    listing = actions.add_parser("list", help="list the models with their size and last use (the default)")
    showing = actions.add_parser("show", help="show one model: folder, architecture, precision, memory")
    removing = actions.add_parser("rm", help="remove a model, or with :QUANT one of its GGUF files")
    for each in (showing, removing):
        each.add_argument("name", type=word, metavar="NAME", help="as `brlite models` lists it")
    for each in (parser, listing, showing):
        each.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    removing.add_argument("--yes", action="store_true", help="remove without asking")
    parser.set_defaults(logs_from="warning", json=False)


def add_check(parser: argparse.ArgumentParser) -> None:
    about = "a .toml, or br-vllm-serving's .json; several: as `brlite proxy` takes them"
    parser.add_argument("config", type=file_path, nargs="*", metavar="FILE", help=about)
    schema = "print the JSON schema of the TOML, for editors: brlite check --schema > brlite.schema.json"
    parser.add_argument("--schema", action="store_true", help=schema)
    dial = "connect to every upstream, and check its health and its models; status 1 if one fails"
    parser.add_argument("--dial", action="store_true", help=dial)
    offline = "check only the fields, not files, keys or memory: for a config of another machine"
    parser.add_argument("--offline", action="store_true", help=offline)


def add_tune(parser: argparse.ArgumentParser) -> None:
    about = "a folder, a .gguf file, or the name of a model that is on this machine (default: a small English model)"
    parser.add_argument("model", type=word, nargs="?", metavar="NAME|PATH", help=about)
    parser.set_defaults(logs_from="warning")


def add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_bench(parser: argparse.ArgumentParser) -> None:
    where = "address of the server (default localhost:8000)"
    parser.add_argument("--url", type=word, default="http://127.0.0.1:8000", help=where)
    parser.add_argument(
        "--model", type=word, metavar="NAME", help="the model (default: the first that the server lists)"
    )
    add_api_key(parser)
    for flag, default, about in (
        ("--requests", 32, "number of requests"),
        ("--concurrency", 8, "requests at the same time"),
        ("--prompt-words", 64, "words per prompt"),
        ("--max-tokens", 64, "tokens per answer"),
    ):
        parser.add_argument(flag, type=int, default=default, metavar="N", help=f"{about} (default {default})")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(logs_from="warning")


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Flags may be written with hyphens or, as in the manual, with underscores."""
    name = "what requests will call it; the hub's folder names, models--Org--Name, are understood"
    parser.add_argument("--model_name", "--model-name", required=True, metavar="NAME", help=name)
    folder = "its folder or .gguf file, or its name on a hub: config, tokenizer and weights"
    parser.add_argument("--model_dir", "--model-dir", type=file_path, required=True, metavar="DIR", help=folder)
    where = "folder in which the bundle's folder is created"
    parser.add_argument("--output_dir", "--output-dir", type=file_path, required=True, metavar="OUT", help=where)
    names = get_args(PrecisionName)
    packed = "precision of the packed weights (default: %(default)s, as br-vllm-serving recommends for all models)"
    parser.add_argument("--precision", choices=names, default=names[-1], help=packed)
    traced = "take the weights from this .pt, which br-vllm-serving traced; config and tokenizer from --model_dir"
    parser.add_argument("--from-pt", "--from_pt", type=file_path, metavar="FILE", help=traced)
    parser.add_argument("--tp", type=int, default=1, help=argparse.SUPPRESS)


def add_inspect(parser: argparse.ArgumentParser) -> None:
    about = "a traced .pt, a bundle, a Hugging Face folder, a .gguf file, packed weights, or a name on a hub"
    parser.add_argument("path", type=file_path, metavar="PATH", help=about)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--verify", action="store_true", help="read a bundle's files and compare their sha256")


def add_verify(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--prompts", type=file_path, metavar="FILE", help="prompts, one per line (default: twelve built-in ones)"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="length of an answer in tokens (default 16)")
    parser.add_argument(
        "--save", type=file_path, metavar="FILE", help="write prompts and answers to FILE, for --against"
    )
    parser.add_argument(
        "--against", type=file_path, metavar="FILE", help="compare with the answers that --save wrote, to its prompts"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(logs_from="warning")


def add_engine_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=file_path, metavar="FILE", help="a .toml, or br-vllm-serving's .json")
    parser.add_argument("--model", type=word, metavar="NAME|PATH", help="model to use, as for serve")
    add_engine(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(logs_from="warning")


def add_worker(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    add_listening(parser)
    parser.add_argument("--channel", type=int, help=argparse.SUPPRESS)  # how `serve` starts the ranks of its machine


def add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help=f"bash or zsh; {HOW}")
    parser.set_defaults(prints_data=True)


def add_config(parser: argparse.ArgumentParser) -> None:
    about = "config file: a .toml, or br-vllm-serving's .json (default: ./brlite.toml, else a small English model)"
    parser.add_argument("config", type=file_path, nargs="?", metavar="CONFIG", help=about)
    parser.add_argument(
        "--model",
        type=word,
        metavar="NAME|PATH",
        help="model to use instead of the config's: a name on a hub, a folder or a file; of several, its name",
    )
    draft = "smaller model of the same vocabulary that drafts tokens ahead (docs/speculation.md)"
    parser.add_argument("--draft", type=word, metavar="PATH", help=draft)
    context = "maximum context in tokens, prompt plus answer (0: the model's maximum, less if memory is short)"
    parser.add_argument("--context", type=int, metavar="N", help=context)
    add_device(parser)
    add_engine(parser)


def add_listening(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", help="address to listen to (default 127.0.0.1)")
    parser.add_argument("--port", type=int, metavar="N", help="port to listen to (default 8000)")
    parser.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error")
    keys = "file with the accepted API keys, one per line; - is standard input"
    parser.add_argument("--api-key-file", type=word, metavar="FILE", help=keys)
    parser.add_argument("--api-key", help=argparse.SUPPRESS)  # refused; argparse would read it as --api-key-file
    origins = (
        "origin of web pages that may call the API, such as https://app.example.com, or *; may be given several times"
    )
    parser.add_argument("--cors", action="append", metavar="ORIGIN", help=origins)
    parser.set_defaults(is_server=True)


def add_device(parser: argparse.ArgumentParser) -> None:
    device = "device that computes: auto (a card, else the CPU), cpu, or the name of a card (docs/devices.md)"
    parser.add_argument("--device", type=word, help=device)
    parser.add_argument("--threads", type=int, metavar="N", help="number of threads (0: one per physical core)")


def add_api_key(parser: argparse.ArgumentParser) -> None:
    about = "environment variable with the server's API key (default: BRLITE_API_KEY, if it is set)"
    parser.add_argument("--api-key-env", type=word, metavar="NAME", help=about)


def add_engine(parser: argparse.ArgumentParser) -> None:
    about = (
        "engine: auto, native, torch, or an installed one such as toy (default: the variable BRLITE_ENGINE, else auto)"
    )
    parser.add_argument("--engine", type=word, metavar="NAME", help=about)
    option = "option for that engine; may be given several times"
    parser.add_argument("--engine-option", action="append", default=[], metavar="NAME=VALUE", help=option)


def add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    length = f"maximum length of an answer in tokens (default {max_tokens or 'half of the context'})"
    parser.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help=length)
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="sampling temperature; 0 always takes the most probable token"
    )


# Command → its arguments and its line in `brlite --help`, in the order of that list.
COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "serve": (add_serve, "serve a model over the OpenAI API"),
    "run": (add_run, "serve a model and chat with it; the server ends with the chat"),
    "proxy": (add_proxy, "forward requests to other servers, by the model's name"),
    "chat": (add_chat, "talk to a model in the terminal"),
    "generate": (add_generate, "complete the prompts of a file"),
    "pull": (add_pull, "download a model by its name"),
    "models": (add_models, "list, show or remove the models on this machine"),
    "check": (add_check, "validate a config and show the memory that it needs"),
    "tune": (add_tune, "recommend precision, context and batch of a model for this machine"),
    "doctor": (add_doctor, "show what this machine has, and which engine will run"),
    "bench": (add_bench, "send a short load to a server and print its speed"),
    "convert": (add_convert, "convert a model to a bundle, which loads faster"),
    "inspect": (add_inspect, "show what a model file or folder contains"),
    "verify": (add_verify, "check that a model gives the same answers alone and in batches, bit for bit"),
    "engine-check": (add_engine_check, "test an engine against the engine contract; status 1 if a check fails"),
    "worker": (add_worker, "run one rank of a model on several machines, under torchrun; rank 0 serves"),
    "completion": (add_completion, "print the completion script of a shell"),
}
