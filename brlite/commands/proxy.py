"""`brlite proxy`: forwards requests to other servers, by the model's name. Has no model of its own."""

from __future__ import annotations

import argparse
from functools import partial

from brlite.commands.given_config import overrides
from brlite.commands.serve import listen
from brlite.config.options import Config
from brlite.config.proxy_files import load_proxy_config
from brlite.config.validation import override


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status."""
    return listen(partial(proxy_config, args), args.config)


def proxy_config(args: argparse.Namespace) -> Config:
    """The config of the files and the flags, read anew by each call."""
    return override(load_proxy_config(args.config, args.upstream), overrides(args))
