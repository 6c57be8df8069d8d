"""The config that a command line names: its file, and what the flags override in it.

Everything heavy is imported inside the functions, as in `cli.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from brlite.errors import ConfigError

if TYPE_CHECKING:
    from brlite.config.options import Config

DEFAULT_CONFIG = Path("brlite.toml")
MODEL_SUFFIXES = (".gguf", ".safetensors", ".bin")
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


def add_config(parser: argparse.ArgumentParser) -> None:
    about = "config file: a .toml, or br-vllm-serving's .json (default: ./brlite.toml, else a small English model)"
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help=about)
    parser.add_argument(
        "--model", metavar="NAME|PATH", help="model to use instead of the config's: a name on a hub, a folder or a file"
    )
    draft = "smaller model of the same vocabulary that guesses tokens ahead (docs/speculation.md)"
    parser.add_argument("--draft", metavar="PATH", help=draft)
    context = "maximum context in tokens, prompt plus answer (0: the model's maximum, less if memory is short)"
    parser.add_argument("--context", type=int, metavar="N", help=context)
    parser.add_argument("--device", help="device that computes: auto, cpu or another torch device")
    parser.add_argument("--threads", type=int, metavar="N", help="number of threads (0: one per physical core)")
    add_engine(parser)


def add_engine(parser: argparse.ArgumentParser) -> None:
    about = (
        "engine: auto, native, torch, or an installed one such as toy (default: the variable BRLITE_ENGINE, else auto)"
    )
    parser.add_argument("--engine", metavar="NAME", help=about)
    option = "option for that engine; may be given several times"
    parser.add_argument("--engine-option", action="append", default=[], metavar="NAME=VALUE", help=option)


def given_config(args: argparse.Namespace) -> Config:
    """The config named on the command line, else `./brlite.toml`, else the defaults; then the overrides."""
    from brlite.config.load import load_config
    from brlite.config.options import Config
    from brlite.config.validation import engine_override, model_override, override

    path = args.config or folders_own()
    config = load_config(_config_file(path)) if path else Config()
    config = override(config, {**overrides(args), **model_override(args.model), **engine_override(args.engine)})
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


def folders_own() -> Path | None:
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


def overrides(args: argparse.Namespace) -> Mapping[str, object]:
    """The fields that were given on the command line."""
    given = {field: getattr(args, name, None) for name, field in _OVERRIDES.items()}
    if (draft := getattr(args, "draft", None)) is not None:
        given["model[0].draft"] = {"path": draft}
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

        if sys.stdin.isatty():
            end = "Ctrl-Z and Enter" if sys.platform == "win32" else "Ctrl-D"
            print(
                f"brlite: reading API keys from the terminal, one a line; {end} ends them", file=sys.stderr, flush=True
            )
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
