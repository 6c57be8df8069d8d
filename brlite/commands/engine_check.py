"""`brlite engine-check`: opens an engine, tests it against the engine contract, and prints a table. No server."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import msgspec

from brlite.backends.plugins.conformance.checks import Outcome, run_checks
from brlite.backends.plugins.conformance.engine_under_test import EngineUnderTest
from brlite.backends.plugins.contract import Capabilities, PluginEngine
from brlite.backends.plugins.discovery import make_engine
from brlite.commands.given_config import given_config
from brlite.config.options import Config

OWN = "brlite"
RESULTS = {"passed": "passed", "failed": "FAILED", "not tried": "not tried"}  # as they are printed
Say = Callable[[str], object]


class EngineReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `brlite engine-check`."""

    engine: str
    capabilities: Capabilities
    keeps_the_contract: bool
    checks: list[Outcome]


def run(args: argparse.Namespace) -> int:
    return print_report(given_config(args), as_json=args.json)


def print_report(config: Config, *, as_json: bool, make: Callable[[str], PluginEngine] = make_engine) -> int:
    """Print the result of each check of the config's engine, by default the built-in one. Returns 1 if one failed."""
    report = check_engine(config, make, (lambda line: None) if as_json else partial(print, flush=True))
    if as_json:
        print(msgspec.json.encode(report).decode())
    return 0 if report.keeps_the_contract else 1


def check_engine(config: Config, make: Callable[[str], PluginEngine], say: Say) -> EngineReport:
    """Open the engine for the config's first model and run every check."""
    name = config.engine.name or OWN
    subject = EngineUnderTest(partial(make, name), config.model[0], config.engine)
    try:
        capabilities = subject.capabilities
        say("\n".join(describe(name, capabilities)))
        outcomes = run_checks(subject, lambda each: say(f"  {each.name:34}{RESULTS[each.result]:11}{each.detail}"))
    finally:
        subject.close()
    num_failed = sum(outcome.result == "failed" for outcome in outcomes)
    num_not_tried = sum(outcome.result == "not tried" for outcome in outcomes)
    num_tried = len(outcomes) - num_not_tried
    if num_failed:
        say(f"\nengine {name} does not keep the contract: {num_failed} of {num_tried} checks failed")
    else:
        say(f"\nengine {name} keeps the contract: {num_tried} checks passed, {num_not_tried} were not tried")
    return EngineReport(engine=name, capabilities=capabilities, keeps_the_contract=not num_failed, checks=outcomes)


def describe(name: str, capabilities: Capabilities) -> list[str]:
    """The engine's own description, in lines."""
    flags = [field for field, value in msgspec.structs.asdict(capabilities).items() if value is True]
    size = f"{capabilities.max_seqs} slots of {capabilities.max_model_len} tokens, {capabilities.vocab_size} logits"
    version = f" {capabilities.version}" if capabilities.version else ""
    return [
        f"engine {name}: {capabilities.name}{version}, {capabilities.device}, {capabilities.dtype}",
        f"  {size}; tolerance {capabilities.tolerance:g}",
        f"  claims {', '.join(flags) or 'nothing more'}",
        *(f"  note: {note}" for note in capabilities.notes),
        "",
    ]
