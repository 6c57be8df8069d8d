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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import brlite
from brlite.commands.arguments import CommandParser, add_completion, completion
from brlite.commands.bench import add_bench, bench
from brlite.commands.convert import add_conversion, add_inspection, convert, inspect
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
DEFAULT_CONFIG = Path("brlite.toml")
MODEL_SUFFIXES = (".gguf", ".safetensors", ".bin")
ALL_ADDRESSES = "0.0.0.0"

# Overrides of one config field each; their values are checked with the field.
_OVERRIDES = {
    "host": "server.host",
    "port": "server.port",
    "log_level": "server.log_level",
    "choice": "proxy.choice",
    "device": "engine.device",
    "threads": "engine.threads",
    "context": "model[0].build_seq",
    "cors": "server.cors_origins",
}
MAX_KEYS_LENGTH = 65536  # characters of keys on standard input
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
    args.config = args.config or _folders_own()
    return _listen(partial(_served_config, args), [args.config] if args.config else [], notes)


def _served_config(args: argparse.Namespace) -> Config:
    from brlite.config.warnings import check_supported

    config = _config(args)
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

    return override(load_proxy_config(args.config, args.upstream), _overrides(args))


def _listen(load: Callable[[], Config], files: Sequence[Path], notes: Sequence[str] = ()) -> int:
    """Serve what is loaded, and again when the files change."""
    gc.disable()  # nothing that is imported is garbage, and looking for some takes a twentieth of a proxy's start
    from brlite.commands.reload import ConfigSource
    from brlite.commands.serve import run
    from brlite.config.warnings import config_warnings, metrics_notes, sent_variables

    gc.enable()
    config = load()
    configure_logging(config.server.log_level)
    read = [f"config: {file}" for file in files] or ["config: no file, the defaults and the command line"]
    for line in (*read, *sent_variables(config), *metrics_notes(config)):
        logging.getLogger(__name__).info("%s", line)
    return run(config, [*notes, *config_warnings(config)], ConfigSource(tuple(files), load))


def _generate(args: argparse.Namespace) -> int:
    from brlite.commands.generate import run
    from brlite.config.warnings import check_supported

    config = _config(args)
    check_supported(config)
    configure_logging("warning")
    return run(config, args.input, args.output, _sampling_given(args), is_chat=args.chat)


def _chat(args: argparse.Namespace) -> int:
    from brlite.commands.chat import run
    from brlite.config.warnings import check_supported

    configure_logging("warning")
    target: Config | str = args.url or _config(args)
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
    return run(_config(args), args.prompts, args.max_tokens, as_json=args.json)


def _engine_check(args: argparse.Namespace) -> int:
    from brlite.commands.engine_check import run

    configure_logging("warning")
    return run(_config(args), as_json=args.json)


def _doctor(args: argparse.Namespace) -> int:
    from brlite.commands.doctor import run

    return run(as_json=args.json)


def _config(args: argparse.Namespace) -> Config:
    """The config named on the command line, else `./brlite.toml`, else the defaults; then the overrides."""
    from brlite.config.load import load_config
    from brlite.config.options import Config
    from brlite.config.validation import engine_override, model_override, override

    path = args.config or _folders_own()
    config = load_config(_config_file(path)) if path else Config()
    config = override(config, {**_overrides(args), **model_override(args.model), **engine_override(args.engine)})
    more: dict[str, object] = {"engine.options": {**config.engine.options, **_engine_options(args.engine_option)}}
    if names := getattr(args, "alias", None):
        if not config.model:
            raise ConfigError(f"--alias {names[0]}: this config has no [[model]]")
        more["proxy.aliases"] = {**config.proxy.aliases, **dict.fromkeys(names, config.model[0].name)}
    return override(config, more)


def _config_file(path: Path) -> Path:
    """`path`, unless a model stands where a config is due, as after `vllm serve`: then raises `ConfigError`."""
    from brlite.checkpoint.model_name import may_be_a_name

    is_config = path.suffix in (".toml", ".json")
    if (
        path.is_dir()
        or path.suffix in MODEL_SUFFIXES
        or (not path.exists() and not is_config and may_be_a_name(str(path)))
    ):
        raise ConfigError(f"{path} is no config file; a model is given by --model {path}")
    return path


def _folders_own() -> Path | None:
    """The current folder's config. It is said aloud, with what of the environment it sends where.

    Raises `ConfigError` for one that another user could have written: a config decides what is loaded and run.
    """
    from brlite.config.load import load_config
    from brlite.config.warnings import sent_variables
    from brlite.files.ownership import why_untrusted

    if not DEFAULT_CONFIG.exists():
        return None
    if stranger := why_untrusted(DEFAULT_CONFIG):
        raise ConfigError(f"{DEFAULT_CONFIG} is not used unasked: {stranger}; name it as the CONFIG to use it")
    # Printed, not logged: the file itself sets the log's level.
    lines = [f"using {DEFAULT_CONFIG.absolute()}", *sent_variables(load_config(DEFAULT_CONFIG))]
    print("\n".join(f"brlite: {line}" for line in lines), file=sys.stderr, flush=True)
    return DEFAULT_CONFIG


def _overrides(args: argparse.Namespace) -> Mapping[str, object]:
    """The fields that were given on the command line."""
    given = {field: getattr(args, name, None) for name, field in _OVERRIDES.items()}
    return {field: value for field, value in (given | _keys(args)).items() if value is not None}


def _keys(args: argparse.Namespace) -> dict[str, object]:
    """The API keys of `--api-key-file`. Those of standard input are read once, and kept when the config is read again.

    Raises `ConfigError` for `--api-key`, which everybody on the machine could read.
    """
    if getattr(args, "api_key", None) is not None:
        raise ConfigError(
            "--api-key: everybody on this machine can read a command line; allowed are --api-key-file FILE, "
            "--api-key-file - (standard input) and the variable BRLITE_API_KEY"
        )
    file = getattr(args, "api_key_file", None)
    if file != "-":
        return {"keys.file": file}
    if getattr(args, "keys_read", None) is None:
        from brlite.http.keys import parse_keys

        text = sys.stdin.read(MAX_KEYS_LENGTH + 1)
        if len(text) > MAX_KEYS_LENGTH:
            raise ConfigError(f"--api-key-file -: allowed on standard input are {MAX_KEYS_LENGTH} characters")
        args.keys_read = parse_keys(text.removeprefix("\ufeff"), "standard input")
    return {"keys.keys": args.keys_read}


def _engine_options(pairs: Sequence[str]) -> dict[str, object]:
    """`NAME=VALUE`, as often as it was given."""
    options = dict(pair.partition("=")[::2] for pair in pairs)
    if not all(options.values()) or "" in options:
        raise ConfigError(f"--engine-option {' '.join(pairs)}: allowed is NAME=VALUE")
    return dict(options)


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
    for add in (
        _add_serve,
        _add_worker,
        _add_proxy,
        _add_generate,
        _add_chat,
        _add_check,
        _add_verify,
        _add_engine_check,
        _add_doctor,
    ):
        add(commands)
    for command, add_arguments, purpose in _COMMANDS:
        add_arguments(_add_command(commands, command, purpose))
    parser.set_defaults(whole_parser=parser)
    return parser


def _seed_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="br_api_server", description="Serve the model of the manual's JSON config.")
    parser.add_argument("--config", "--config_path", type=Path, required=True, metavar="FILE", help="the config")
    parser.add_argument("--host", help="address to listen to (default: the TOML's; for a JSON, all)")
    parser.add_argument("--port", type=int, metavar="N", help="port to listen to")
    _add_engine(parser)
    parser.set_defaults(command=_serve_as_in_the_manual, model=None, is_server=True)
    return parser


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add_command(commands, _serve, "serve a model over the OpenAI API")
    _add_config(parser)
    about = "another name that requests may use for the model; may be given several times"
    parser.add_argument("--alias", action="append", metavar="NAME", help=about)
    _add_listening(parser)


def _add_worker(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "be one rank of a model on several machines, started by torchrun; rank 0 serves"
    parser = _add_command(commands, _worker, about)
    _add_config(parser)
    _add_listening(parser)
    parser.add_argument("--channel", type=int, help=argparse.SUPPRESS)  # how `serve` starts the ranks of its machine


def _add_proxy(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add_command(commands, _proxy, "forward requests to the servers that have their models")
    about = "a .toml with [[upstream]] tables, and br-vllm-serving's .json files, whose all_models are put together"
    parser.add_argument("config", type=Path, nargs="*", metavar="CONFIG", help=about)
    upstream = "a server, such as http://127.0.0.1:8001, and the model it has; the same name again is a replica"
    parser.add_argument("--upstream", action="append", default=[], metavar="NAME=URL", help=upstream)
    parser.add_argument("--choice", metavar="HOW", help="among replicas: least_loaded, round_robin, prefix or sticky")
    _add_listening(parser)


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add_command(commands, _generate, "complete the prompts of a file")
    parser.set_defaults(prints_data=True)
    _add_config(parser)
    source = 'prompts, one a line, or JSON lines {"prompt": …} that may set any sampling field; - is standard input'
    parser.add_argument("--input", default="-", metavar="FILE", help=source)
    parser.add_argument("--output", default="-", metavar="FILE", help="JSON lines; - is standard output")
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's message, for a chat model")
    _add_sampling(parser, max_tokens=256)
    parser.add_argument("--top-p", type=float, metavar="P", help="keep the most probable tokens up to this sum")
    parser.add_argument("--top-k", type=int, metavar="K", help="keep the K most probable tokens")
    parser.add_argument("--seed", type=int, metavar="N", help="makes the answers repeatable")
    parser.add_argument("--n", type=int, metavar="N", help="answers for each prompt")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="ends an answer; may be given several times")


def _add_chat(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add_command(commands, _chat, "talk to a model in the terminal")
    _add_config(parser)
    parser.add_argument("--url", help="talk to a server, such as http://127.0.0.1:8000, in place of a model of our own")
    parser.add_argument(
        "--api-key-env", default="BRLITE_API_KEY", metavar="NAME", help="variable with the server's key"
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    _add_sampling(parser, max_tokens=None)


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add_command(commands, _check, "validate a config and say what it will take")
    about = "a .toml, or br-vllm-serving's .json; several: as `brlite proxy` takes them"
    parser.add_argument("config", type=Path, nargs="*", metavar="FILE", help=about)
    schema = "print the JSON schema of the TOML, for editors: brlite check --schema > brlite.schema.json"
    parser.add_argument("--schema", action="store_true", help=schema)
    dial = "ask every upstream whether it is there, well, and has its models; status 1 if one is not"
    parser.add_argument("--dial", action="store_true", help=dial)
    offline = "check the fields only: the config is for another machine, with files, keys and memory of its own"
    parser.add_argument("--offline", action="store_true", help=offline)


def _add_verify(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add_command(commands, _verify, "compare what a model says alone and in company, bit for bit")
    _add_config(parser)
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="prompts, one a line (default: a dozen of our own)"
    )
    parser.add_argument("--max-tokens", type=int, default=16, metavar="N", help="length of an answer (default 16)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_engine_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add_command(commands, _engine_check, "try whether an engine keeps the contract; status 1 if not")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a .toml, or br-vllm-serving's .json")
    parser.add_argument("--model", metavar="NAME|PATH", help="the model, if not the config's")
    _add_engine(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add_command(commands, _doctor, "say what was found on this machine")
    parser.add_argument("--json", action="store_true", help="print JSON")


# Commands whose arguments stand in their own files.
_COMMANDS: tuple[tuple[Command, Callable[[argparse.ArgumentParser], None], str], ...] = (
    (run, add_run, "serve a model and chat with it; the server ends with the chat"),
    (pull, add_pull, "fetch a model by its name"),
    (models, add_models, "list, show or remove the models on this machine"),
    (convert, add_conversion, "make a bundle of a model, which loads at once"),
    (inspect, add_inspection, "say what a model file or folder holds"),
    (tune, add_tune, "advise precision, context and batch of a model for this machine"),
    (bench, add_bench, "put a short load on a server, and print its speed"),
    (completion, add_completion, "print the completions of a shell"),
)


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], command: Command, purpose: str
) -> argparse.ArgumentParser:
    name = command.__name__.removeprefix("_").replace("_", "-")
    parser = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
    parser.set_defaults(command=command)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    about = "a .toml, or br-vllm-serving's .json (default: ./brlite.toml, else a small English model)"
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help=about)
    parser.add_argument("--model", metavar="NAME|PATH", help="the model, if not the config's")
    context = "longest context in tokens, prompt and answer together (0: the model's, as far as memory goes)"
    parser.add_argument("--context", type=int, metavar="N", help=context)
    parser.add_argument("--device", help="auto, cpu or another torch device")
    parser.add_argument("--threads", type=int, metavar="N", help="0: one for each physical core")
    _add_engine(parser)


def _add_engine(parser: argparse.ArgumentParser) -> None:
    about = "what computes: auto, native, torch, or an installed engine such as toy (default: BRLITE_ENGINE's, if set)"
    parser.add_argument("--engine", metavar="NAME", help=about)
    option = "an option of that engine; may be given several times"
    parser.add_argument("--engine-option", action="append", default=[], metavar="NAME=VALUE", help=option)


def _add_listening(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", help="address to listen to (default 127.0.0.1)")
    parser.add_argument("--port", type=int, metavar="N", help="port to listen to (default 8000)")
    parser.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error")
    keys = "file with the API keys that are accepted, one a line; - is standard input"
    parser.add_argument("--api-key-file", metavar="FILE", help=keys)
    parser.add_argument("--api-key", help=argparse.SUPPRESS)  # refused: else it would be short for the one above
    origins = "web page that may ask, such as https://app.example.com, or *; may be given several times"
    parser.add_argument("--cors", action="append", metavar="ORIGIN", help=origins)
    parser.set_defaults(is_server=True)


def _add_sampling(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    length = f"length of an answer at most (default {max_tokens or 'half of the context'})"
    parser.add_argument("--max-tokens", type=int, default=max_tokens, metavar="N", help=length)
    parser.add_argument("--temperature", type=float, metavar="T", help="0 always takes the most probable token")
