"""The config and the sampling parameters that a command line gives."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from brlite.checkpoint.model_file import is_gguf
from brlite.config.load import load_config
from brlite.config.options import Config, ModelSpec
from brlite.config.validation import engine_override, model_override, override, show
from brlite.config.warnings import check_supported, sent_variables
from brlite.errors import ConfigError
from brlite.files.ownership import why_untrusted
from brlite.files.quoting import shown
from brlite.sampling_params import SamplingParams

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
SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "seed", "n", "stop")
MAX_KEYS_LENGTH = 65536  # characters of keys on standard input


def given_config(args: argparse.Namespace) -> Config:
    """The config named on the command line, else `./brlite.toml`, else the defaults; then the flags override fields.

    Raises `ConfigError`, also for a valid config that this version cannot serve.
    """
    path = args.config or find_own_config()
    if path and is_model(path):
        raise ConfigError(f"{path} is no config file; a model is given by --model {path}")  # as in `vllm serve MODEL`
    config = load_config(path) if path else Config()
    config = _with_model(config, args.model, serves_all=getattr(args, "is_server", False))
    config = override(config, {**overrides(args), **engine_override(args.engine)})

    options = dict(pair.partition("=")[::2] for pair in args.engine_option)
    if not all(options.values()) or "" in options or len(options) < len(args.engine_option):
        raise ConfigError(f"--engine-option {' '.join(args.engine_option)}: allowed is NAME=VALUE, each name once")
    more: dict[str, object] = {"engine.options": {**config.engine.options, **options}}
    if names := getattr(args, "alias", None):
        if len(config.model) != 1:
            found = "several [[model]] tables: write it into proxy.aliases" if config.model else "no [[model]]"
            raise ConfigError(f"--alias {names[0]}: this config has {found}")
        more["proxy.aliases"] = {**config.proxy.aliases, **dict.fromkeys(names, config.model[0].name)}
    config = override(config, more)
    check_supported(config)
    return config


def _with_model(config: Config, model: str | None, *, serves_all: bool) -> Config:
    """The config with the model of `--model`: the one of this name, else another in place of the config's only one.

    Prints what is left out or kept. Raises `ConfigError` if the config has several models, and none has this name.
    """
    notes = []
    chosen = [spec for spec in config.model if spec.name == model]
    if chosen and (len(config.model) > 1 or chosen[0].path is not None):
        if len(config.model) > 1:
            notes = [f"--model {model}: the config's other [[model]] are left out"]
        config = msgspec.structs.replace(config, model=tuple(chosen))
    elif model is not None and len(config.model) > 1:
        names = ", ".join(spec.name for spec in config.model)
        raise ConfigError(f"--model {model}: allowed is a model of this config, one of {names}")
    elif model is not None:
        config = override(config, model_override(model))
        spec = config.model[0]
        plain = ModelSpec(name=spec.name, path=spec.path)
        kept = [
            f"{field} = {show(value)}"
            for field, value in msgspec.structs.asdict(spec).items()
            if value != getattr(plain, field)
        ]
        if kept:
            notes = [f"--model {model} keeps the other options of the config's [[model]]: {', '.join(kept)}"]
    elif len(config.model) > 1 and not serves_all:
        notes = [f"the config's first [[model]] is used, {config.model[0].name}; --model NAME chooses another"]
    for note in notes:
        print(f"brlite: {shown(note)}", file=sys.stderr, flush=True)
    return config


def is_model(path: Path) -> bool:
    """Whether what stands where a config is expected may be a model: a folder, a file of weights, a name of no file."""
    is_name = not path.exists() and path.suffix not in (".toml", ".json")
    return path.is_dir() or path.suffix in MODEL_SUFFIXES or is_name or (path.is_file() and is_gguf(path))


def find_own_config() -> Path | None:
    """`brlite.toml` of the current folder, if there is one. Prints that it is used, and which secrets it sends where.

    Raises `ConfigError` for a file that another user could have written: a config decides what is loaded and run.
    """
    if not DEFAULT_CONFIG.exists():
        return None
    if reason := why_untrusted(DEFAULT_CONFIG):
        raise ConfigError(f"{DEFAULT_CONFIG} is not loaded by default: {reason}; to use it, give its name as CONFIG")
    # Printed, not logged: the file itself sets the log's level.
    lines = [f"using {DEFAULT_CONFIG.absolute()}", *sent_variables(load_config(DEFAULT_CONFIG))]
    print("\n".join(f"brlite: {shown(line)}" for line in lines), file=sys.stderr, flush=True)
    return DEFAULT_CONFIG


def overrides(args: argparse.Namespace) -> Mapping[str, object]:
    """The fields that were given on the command line: name with its section → value.

    API keys on standard input are read once, and kept for when the config is read again. Raises `ConfigError` for
    `--api-key`: all users of the machine could read it.
    """
    given = {field: getattr(args, name, None) for name, field in _OVERRIDES.items()}
    if (draft := getattr(args, "draft", None)) is not None:
        given["model[0].draft"] = {"path": draft}
    if getattr(args, "api_key", None) is not None:
        raise ConfigError(
            "--api-key: everybody on this machine can read a command line; allowed are --api-key-file FILE, "
            "--api-key-file - (standard input) and the variable BRLITE_API_KEY"
        )
    file = getattr(args, "api_key_file", None)
    if file == "-":
        if getattr(args, "keys_read", None) is None:
            from brlite.http.keys import parse_keys  # aiohttp: 0.3 s, which commands that are no servers do not need

            ask_for("API keys")
            text = sys.stdin.read(MAX_KEYS_LENGTH + 1)
            if len(text) > MAX_KEYS_LENGTH:
                raise ConfigError(f"--api-key-file -: allowed on standard input are {MAX_KEYS_LENGTH} characters")
            args.keys_read = parse_keys(text.removeprefix("\ufeff"), "standard input")
        given["keys.keys"] = args.keys_read
    else:
        given["keys.file"] = file
    return {field: value for field, value in given.items() if value is not None}


def ask_for(what: str) -> None:
    """Tell a user at the terminal that lines are read from it, and how they end."""
    if sys.stdin.isatty():
        end = "Ctrl-Z and Enter" if sys.platform == "win32" else "Ctrl-D"
        text = f"brlite: reading {what} from the terminal, one a line; {end} ends them"
        print(text, file=sys.stderr, flush=True)


def given_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling parameters of the command line. The model has its own defaults for the others.

    Raises `InvalidRequest` for a value out of range.
    """
    given = {name: getattr(args, name, None) for name in SAMPLING}
    given = {"max_tokens": None} | {name: value for name, value in given.items() if value is not None}
    SamplingParams(**given)
    return given
