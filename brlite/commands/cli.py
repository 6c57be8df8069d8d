"""The commands: parse, load the config, hand over, turn errors into an exit status. Knows nothing of how they work.

Only this file configures logging and exits. Everything heavy is imported inside the functions: `brlite --help` must
not wait for torch.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import brlite
from brlite.commands.arguments import CommandParser, add_completion, completion
from brlite.commands.bench import add_bench, bench
from brlite.commands.convert import add_conversion, add_inspection, convert, inspect
from brlite.commands.given_config import add_config, add_engine, folders_own, given_config, overrides
from brlite.commands.log_handler import configure_logging
from brlite.commands.models import add_models, add_pull, models, pull
from brlite.commands.run import add_run, run
from brlite.commands.tune import add_tune, tune
from brlite.errors import BrliteError, ConfigError
from brlite.files.quoting import shown
from brlite.process.init_process import leave_process_1
from brlite.process.output import queued_output
from brlite.process.streams import open_closed_streams, print_data, show_all_text

if TYPE_CHECKING:
    from brlite.config.options import Config

NO_THREAD = "can't start new thread"  # the text of Python's RuntimeError
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
ALL_ADDRESSES = "0.0.0.0"

_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "seed", "n", "stop")

# Read when torch loads: how long its threads spin before they sleep. Without a bound a step takes several times as long
# on cores that others use too, and hardly less on idle ones (`bench/README.md`, "Threads that wait").
# numpy's own threads are never used; where none can be made (`ulimit -v`), to start them ends the process.
_ENVIRONMENT = {"GOMP_SPINCOUNT": "10000", "OPENBLAS_NUM_THREADS": "1"}

Command = Callable[[argparse.Namespace], int]


def main(argv: list[str] | None = None) -> int:
    """Run `brlite …`. Returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    return _run(command_parser(), argv)


def br_api_server(argv: list[str] | None = None) -> int:
    """Run the manual's command, `br_api_server --config FILE --port N`. For the manual's JSON it listens as there."""
    return _run(_seed_parser(), argv)


def model_convert(argv: list[str] | None = None) -> int:
    """Run the manual's command, `model_convert --model_name N --model_dir DIR --output_dir OUT`."""
    parser = CommandParser(prog="model_convert", description="Make a bundle of a model, as `brlite convert`.")
    add_conversion(parser)
    return _run(parser, argv)


def _run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Run the command. Its errors are one line each; a reader of its output that leaves early, as `head` does, is none.

    A server's output is queued to the end, so that nobody who reads it can hold or end the server.
    """
    try:
        leave_process_1()
        open_closed_streams()
        show_all_text()
        args = parser.parse_args(argv)
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if getattr(args, "prints_data", False) or getattr(args, "json", False):
            print_data()
        with ExitStack() as stack:
            if getattr(args, "is_server", False):
                stack.enter_context(queued_output())
            status = _status_of(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python would complain once more when it flushes.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 0


def _status_of(args: argparse.Namespace) -> int:
    command: Command = args.command
    if level := getattr(args, "logs_from", None):
        configure_logging(level)
    try:
        return command(args)
    except BrliteError as error:
        print("\n".join(f"brlite: error: {line}" for line in shown(str(error)).splitlines()), file=sys.stderr)
        return EXIT_BAD_INPUT
    except BrokenPipeError:
        raise
    except OSError as error:  # a folder that cannot be searched, a disk that is full
        where = f"{error.filename}: " if error.filename is not None else ""
        print(shown(f"brlite: error: {where}{error.strerror or error}"), file=sys.stderr)
        return EXIT_FAILED
    except (MemoryError, RuntimeError, SystemError) as error:
        # Extensions that get no memory may return without an exception, which Python reports as a SystemError.
        has_no_memory = isinstance(error, MemoryError) or str(error).endswith("without exception set")
        if not has_no_memory and NO_THREAD not in str(error):
            raise
        reason = "no memory is left" if has_no_memory else "the system gives no further thread"
        print(f"brlite: error: {reason}: look at ulimit -v, ulimit -u and the container's limits", file=sys.stderr)
        return EXIT_FAILED


def _serve(args: argparse.Namespace, *notes: str) -> int:
    is_named = args.config is not None
    args.config = args.config or folders_own()
    files = [args.config] if args.config else []
    return _listen(partial(_served_config, args), files, notes, is_announced=not is_named and bool(files))


def _served_config(args: argparse.Namespace) -> Config:
    from brlite.config.warnings import check_supported

    config = given_config(args)
    check_supported(config)
    return config


def _serve_as_in_the_manual(args: argparse.Namespace) -> int:
    """The manual's JSON cannot name a host, and its server listens to the whole network; a TOML's host is its own."""
    if args.host is not None or args.config.suffix != ".json":
        return _serve(args)
    args.host = ALL_ADDRESSES
    return _serve(args, f"listening on all addresses ({ALL_ADDRESSES}), as the manual's server does; --host changes it")


def _worker(args: argparse.Namespace) -> int:
    """Where a launcher has made this process rank 0, it serves."""
    from brlite.commands.worker import launched_place, run

    if args.channel is None:
        if launched_place().rank == 0:
            return _serve(args)
        args.log_level = _served_config(args).server.log_level
    configure_logging(args.log_level or "warning")
    return run(args.channel)


def _proxy(args: argparse.Namespace) -> int:
    return _listen(partial(_proxy_config, args), args.config)


def _proxy_config(args: argparse.Namespace) -> Config:
    from brlite.config.proxy_files import load_proxy_config
    from brlite.config.validation import override

    return override(load_proxy_config(args.config, args.upstream), overrides(args))


def _listen(
    load: Callable[[], Config], files: Sequence[Path], notes: Sequence[str] = (), *, is_announced: bool = False
) -> int:
    """Serve what is loaded, and again when the files change. Files that are announced were printed by `folders_own`."""
    gc.disable()  # nothing that is imported is garbage, and looking for some takes a twentieth of a proxy's start
    from brlite.commands.reload import ConfigSource
    from brlite.commands.serve import run
    from brlite.config.warnings import config_warnings, metrics_notes, sent_variables

    gc.enable()
    config = load()
    configure_logging(config.server.log_level)
    read = [f"config: {file}" for file in files] or ["config: no file, the defaults and the command line"]
    for line in (*(() if is_announced else (*read, *sent_variables(config))), *metrics_notes(config)):
        logging.getLogger(__name__).info("%s", line)
    return run(config, [*notes, *config_warnings(config)], ConfigSource(tuple(files), load))


def _generate(args: argparse.Namespace) -> int:
    from brlite.commands.generate import run
    from brlite.config.warnings import check_supported

    config = given_config(args)
    check_supported(config)
    configure_logging("warning")
    return run(config, args.input, args.output, _sampling_given(args), is_chat=args.chat)


def _chat(args: argparse.Namespace) -> int:
    from brlite.commands.chat import run
    from brlite.config.warnings import check_supported

    configure_logging("warning")
    target: Config | str = args.url or given_config(args)
    if not isinstance(target, str):
        check_supported(target)
    return run(
        target,
        model=args.model,
        api_key=os.environ.get(args.api_key_env),
        system=args.system,
        given=_sampling_given(args),
    )


def _check(args: argparse.Namespace) -> int:
    from brlite.commands.check import run

    if args.schema:
        from brlite.config.render import toml_schema

        print(toml_schema())
        return 0
    if not args.config:
        raise ConfigError("check: name a FILE to check, or give --schema")
    return run(*args.config, dial=args.dial, is_offline=args.offline)


def _verify(args: argparse.Namespace) -> int:
    from brlite.commands.verify import run

    configure_logging("warning")
    return run(given_config(args), args.prompts, args.max_tokens, as_json=args.json)


def _engine_check(args: argparse.Namespace) -> int:
    from brlite.commands.engine_check import run

    configure_logging("warning")
    return run(given_config(args), as_json=args.json)


def _doctor(args: argparse.Namespace) -> int:
    from brlite.commands.doctor import run

    return run(as_json=args.json)


def _sampling_given(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters of the command line. The others are the model's own defaults."""
    from brlite.sampling_params import SamplingParams

    given = {name: getattr(args, name, None) for name in _SAMPLING}
    given = {"max_tokens": None} | {name: value for name, value in given.items() if value is not None}
    SamplingParams(**given)  # raises for what is out of range, before a model is loaded
    return given


def command_parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = CommandParser(
        prog="brlite", description="A compact asyncio server for large language models."
    )
    parser.add_argument("--version", action="version", version=f"brlite {brlite.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, add_arguments, purpose in _COMMANDS:
        name = command.__name__.removeprefix("_").replace("_", "-")
        parser_of_command = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        parser_of_command.set_defaults(command=command)
        add_arguments(parser_of_command)
    parser.set_defaults(whole_parser=parser)
    return parser


def _seed_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="br_api_server", description="Serve the model of the manual's JSON config.")
    parser.add_argument("--config", "--config_path", type=Path, required=True, metavar="FILE", help="the config")
    parser.add_argument("--host", help="address to listen to (default: the TOML's; for a JSON, all)")
    parser.add_argument("--port", type=int, metavar="N", help="port to listen to")
    add_engine(parser)
    parser.set_defaults(command=_serve_as_in_the_manual, model=None, is_server=True)
    return parser


def _add_serve(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    about = "additional name for the model in requests; may be given several times"
    parser.add_argument("--alias", action="append", metavar="NAME", help=about)
    _add_listening(parser)


def _add_worker(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    _add_listening(parser)
    parser.add_argument("--channel", type=int, help=argparse.SUPPRESS)  # how `serve` starts the ranks of its machine


def _add_proxy(parser: argparse.ArgumentParser) -> None:
    about = "a .toml with [[upstream]] tables; or br-vllm-serving's .json files, whose all_models lists are merged"
    parser.add_argument("config", type=Path, nargs="*", metavar="CONFIG", help=about)
    upstream = "a model and its server, such as http://127.0.0.1:8001; the same name again adds a replica"
    parser.add_argument("--upstream", action="append", default=[], metavar="NAME=URL", help=upstream)
    parser.add_argument(
        "--choice", metavar="HOW", help="how to choose among replicas: least_loaded, round_robin, prefix or sticky"
    )
    _add_listening(parser)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(prints_data=True)
    add_config(parser)
    source = 'prompts, one per line, or JSON lines {"prompt": …} with any sampling fields; - is standard input'
    parser.add_argument("--input", default="-", metavar="FILE", help=source)
    parser.add_argument(
        "--output", default="-", metavar="FILE", help="file for the answers, as JSON lines; - is standard output"
    )
    parser.add_argument("--chat", action="store_true", help="send each prompt as a user's message, for a chat model")
    _add_sampling(parser, max_tokens=256)
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the most probable tokens whose probabilities add up to P"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K most probable tokens")
    parser.add_argument("--seed", type=int, metavar="N", help="random seed: the same seed gives the same answers")
    parser.add_argument("--n", type=int, metavar="N", help="number of answers per prompt")
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="text that ends an answer; may be given several times"
    )


def _add_chat(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--url", help="chat with this server, such as http://127.0.0.1:8000, instead of loading a model"
    )
    parser.add_argument(
        "--api-key-env", default="BRLITE_API_KEY", metavar="NAME", help="environment variable with the server's API key"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    _add_sampling(parser, max_tokens=None)


def _add_check(parser: argparse.ArgumentParser) -> None:
    about = "a .toml, or br-vllm-serving's .json; several: as `brlite proxy` takes them"
    parser.add_argument("config", type=Path, nargs="*", metavar="FILE", help=about)
    schema = "print the JSON schema of the TOML, for editors: brlite check --schema > brlite.schema.json"
    parser.add_argument("--schema", action="store_true", help=schema)
    dial = "connect to every upstream, and check its health and its models; status 1 if one fails"
    parser.add_argument("--dial", action="store_true", help=dial)
    offline = "check only the fields, not files, keys or memory: for a config of another machine"
    parser.add_argument("--offline", action="store_true", help=offline)


def _add_verify(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="prompts, one per line (default: twelve built-in ones)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=16, metavar="N", help="length of an answer in tokens (default 16)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_engine_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="a .toml, or br-vllm-serving's .json")
    parser.add_argument("--model", metavar="NAME|PATH", help="model to use instead of the config's")
    add_engine(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


# In the order of `brlite --help`.
_COMMANDS: tuple[tuple[Command, Callable[[argparse.ArgumentParser], None], str], ...] = (
    (_serve, _add_serve, "serve a model over the OpenAI API"),
    (run, add_run, "serve a model and chat with it; the server ends with the chat"),
    (_proxy, _add_proxy, "forward requests to other servers, by the model's name"),
    (_chat, _add_chat, "talk to a model in the terminal"),
    (_generate, _add_generate, "complete the prompts of a file"),
    (pull, add_pull, "download a model by its name"),
    (models, add_models, "list, show or remove the models on this machine"),
    (_check, _add_check, "validate a config and show the memory that it needs"),
    (tune, add_tune, "recommend precision, context and batch of a model for this machine"),
    (_doctor, _add_doctor, "show what this machine has, and which engine will run"),
    (bench, add_bench, "send a short load to a server and print its speed"),
    (convert, add_conversion, "convert a model to a bundle, which loads faster"),
    (inspect, add_inspection, "show what a model file or folder contains"),
    (_verify, _add_verify, "check that a model gives the same answers alone and in batches, bit for bit"),
    (_engine_check, _add_engine_check, "test an engine against the engine contract; status 1 if a check fails"),
    (_worker, _add_worker, "run one rank of a model on several machines, under torchrun; rank 0 serves"),
    (completion, add_completion, "print the completion script of a shell"),
)


def _add_listening(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", help="address to listen to (default 127.0.0.1)")
    parser.add_argument("--port", type=int, metavar="N", help="port to listen to (default 8000)")
    parser.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error")
    keys = "file with the accepted API keys, one per line; - is standard input"
    parser.add_argument("--api-key-file", metavar="FILE", help=keys)
    parser.add_argument("--api-key", help=argparse.SUPPRESS)  # refused: else it would be short for the one above
    origins = (
        "origin of web pages that may call the API, such as https://app.example.com, or *; may be given several times"
    )
    parser.add_argument("--cors", action="append", metavar="ORIGIN", help=origins)
    parser.set_defaults(is_server=True)


def _add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    length = f"maximum length of an answer in tokens (default {max_tokens or 'half of the context'})"
    parser.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help=length)
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="sampling temperature; 0 always takes the most probable token"
    )
