"""The command line: parses it, runs the command, and turns errors into one line and an exit status.

The arguments of the commands are in `arguments.py`. A command is imported only when it runs.
"""

from __future__ import annotations

import argparse
import atexit
import errno
import gc
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from typing import NoReturn

import brlite
from brlite.commands.arguments import COMMANDS, add_br_api_server, add_convert
from brlite.commands.command_line import CommandParser
from brlite.errors import BrliteError, CannotListen, ModelUnreachable
from brlite.files.quoting import shown
from brlite.process.output import queued_output
from brlite.process.signals import Terminated, leave_process_1, reset_child_signal, terminated_by_signals
from brlite.process.streams import configure_logging, open_closed_streams, print_data, show_all_text

NO_THREAD = "can't start new thread"  # the text of Python's RuntimeError
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_SIGNAL = 128  # and the number of the signal, as a shell reports it

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # also of the `OSError` that caused one of our errors

# Read when torch loads: how long its threads spin before they sleep. Without a bound, a step takes several times longer
# on cores shared with other programs, and hardly less on idle ones (`bench/kernels.md`, "Threads that wait").
# numpy's own threads are never used. If they cannot be created (`ulimit -v`), starting them ends the process.
# tokenizers would start a thread for each core to encode one text.
ENVIRONMENT = {"GOMP_SPINCOUNT": "10000", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `brlite …`. Returns the exit status: 0, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM."""
    return _run(command_parser(), argv)


def br_api_server(argv: Sequence[str] | None = None) -> int:
    """Run the manual's command, `br_api_server --config FILE --port N`. With a JSON it listens on all addresses."""
    parser = CommandParser(prog="br_api_server", description="Serve the model of br-vllm-serving's JSON config.")
    add_br_api_server(parser)
    parser.set_defaults(command="serve")
    return _run(parser, argv)


def model_convert(argv: Sequence[str] | None = None) -> int:
    """Run the manual's command, `model_convert --model_name N --model_dir DIR --output_dir OUT`."""
    parser = CommandParser(prog="model_convert", description="Make a bundle of a model, as `brlite convert`.")
    add_convert(parser)
    parser.set_defaults(command="convert")
    return _run(parser, argv)


def end_process(status: int) -> NoReturn:
    """Run the functions of `atexit`, write what streams have buffered, and end the process.

    Python's own end is left out. It frees modules, native memory and the state of daemon threads, such as a load or a
    read that blocks, while those threads run on: CPython 3.11 may end with a segmentation fault. On a busy machine it
    takes seconds, and it waits for what the threads of pools have queued.
    """
    try:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # it is closed, or there is none
                stream.flush()
    finally:
        os._exit(status)


def command_parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = CommandParser(
        prog="brlite", description="A compact asyncio server for large language models."
    )
    parser.add_argument("--version", action="version", version=f"brlite {brlite.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (add_arguments, purpose) in COMMANDS.items():
        parser_of_command = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        parser_of_command.set_defaults(command=name)
        add_arguments(parser_of_command)
    return parser


def _run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Run a command. If the reader of its output closes the pipe early, as `head` does, that is no error.

    A server's output is queued to the end, so that a reader that is slow or gone neither blocks nor ends the server.
    """
    try:
        reset_child_signal()
        leave_process_1()
        open_closed_streams()
        show_all_text()
        args = parser.parse_args(argv)
        del parser  # 0.2 MB, which the command's imports can use
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if getattr(args, "prints_data", False) or getattr(args, "json", False):
            print_data()
        with ExitStack() as stack:
            if getattr(args, "is_server", False):
                stack.enter_context(queued_output())
            status = _status_of(args)
        sys.stdout.flush()
        return status
    except Terminated as end:
        return EXIT_SIGNAL + end.number
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Python would report the broken pipe again when it flushes the streams at exit.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 0


def _status_of(args: argparse.Namespace) -> int:
    """Run the command. Each of its errors is printed on one line."""
    if level := getattr(args, "logs_from", None):
        configure_logging(level)
    try:
        gc.disable()  # imports leave no garbage, and collecting takes a twentieth of a proxy's start
        if getattr(args, "is_server", False):
            from brlite.http.certificates import certificates_read_late

            with certificates_read_late():
                import aiohttp  # noqa: F401
        command = import_module(f"brlite.commands.{args.command.replace('-', '_')}")
        gc.enable()
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # an import may raise ImportError for KeyboardInterrupt
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with terminated_by_signals():
            return int(command.run(args))
    except BrliteError as error:
        print("\n".join(f"brlite: error: {line}" for line in shown(str(error)).splitlines()), file=sys.stderr)
        is_disk_full = getattr(error.__cause__, "errno", None) in DISK_FULL
        return EXIT_FAILED if is_disk_full or isinstance(error, CannotListen | ModelUnreachable) else EXIT_BAD_INPUT
    except BrokenPipeError:
        raise
    except OSError as error:  # a folder that cannot be searched, a disk that is full
        where = f"{error.filename}: " if error.filename is not None else ""
        print(shown(f"brlite: error: {where}{error.strerror or error}"), file=sys.stderr)
        return EXIT_FAILED
    except (ImportError, MemoryError, RuntimeError, SystemError) as error:
        # An extension that gets no memory may return without an exception, which Python reports as a SystemError.
        signs = ("without exception set", "failed to map segment from shared object")
        has_no_memory = isinstance(error, MemoryError) or str(error).rstrip().endswith(signs)
        if not has_no_memory and NO_THREAD not in str(error):
            raise
        reason = "no memory is left" if has_no_memory else "the system gives no further thread"
        print(f"brlite: error: {reason}: look at ulimit -v, ulimit -u and the container's limits", file=sys.stderr)
        return EXIT_FAILED
