"""The console command `ccnet`: declares the subcommands; each imports what it needs only when it runs."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import signal
import sys
from typing import Any

from ccnet import __version__
from ccnet.cli.logs import reporting
from runtime.errors import CCNetError, Interrupted
from runtime.files import give_up
from runtime.packages import distribution_of, missing
from runtime.schema import quote

log = logging.getLogger(__name__)

COMMANDS = (
    "demo",
    "synthesize",
    "presets",
    "check_data",
    "train",
    "import_weights",
    "import_extractor",
    "extract",
    "export",
    "rebuild",
    "verify",
    "reference",
    "predict",
    "evaluate",
    "convert",
    "compare",
    "serve",
    "triton",
    "show",
    "inspect",
    "bench",
    "doctor",
)
"""One module each in `ccnet.cli`: `register(subparsers)` declares it, `run(arguments, overrides)` does it."""

RENAMED = {"plant": "synthesize"}
"""Former names of subcommands, which this release still understands."""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand. Return its exit status: 0, a `CCNetError.exit_code`, or 130 after Ctrl-C."""
    _fill_standard_streams()
    try:
        return _main(argv)
    except KeyboardInterrupt:  # while the command's modules are imported
        with contextlib.suppress(OSError):
            print("ccnet: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def _main(argv: list[str] | None) -> int:
    parser, _ = make_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what may come next
        _complete(parser)
    argv = list(sys.argv[1:] if argv is None else argv)
    former = argv[0] if argv and argv[0] in RENAMED else None
    if former is not None:
        argv[0] = RENAMED[former]
    arguments, rest = parser.parse_known_args([_hyphenated(word) for word in argv])
    module = importlib.import_module(f"ccnet.cli.{arguments.command.replace('-', '_')}")
    if rest and not getattr(module, "TAKES_OVERRIDES", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    with reporting(quiet=getattr(arguments, "quiet", False)):
        if former is not None:
            log.warning("'ccnet %s' is now 'ccnet %s'; the next release drops the old name", former, argv[0])
        return _run(module, arguments, rest)


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the command line, and that of each subcommand by its name."""
    parser = argparse.ArgumentParser(
        prog="ccnet",
        description="Train, export, verify and run CCNet, the dense audio-visual event localizer.",
        epilog="Exit status: 0 done; 1 some videos failed, or a check found something; 2 it could not be done; 3 an "
        "engine failed the parity check; 130 or 143 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"ccnet {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"ccnet.cli.{name}").register(subparsers)
    return parser, dict(subparsers.choices)


def _hyphenated(word: str) -> str:
    """Return an option with hyphens where it was typed with underscores; settings (`--section.field`) stay.

    The home folder of `--option=~/path`, which the shell leaves to the program, is filled in.
    """
    name, equals, value = word.partition("=")
    if not name.startswith("--") or "." in name:
        return word
    return name.replace("_", "-") + equals + os.path.expanduser(value)


def _complete(parser: argparse.ArgumentParser) -> None:
    """Print what may come next and end the process, where the package for that is installed."""
    with contextlib.suppress(ModuleNotFoundError):
        import argcomplete

        argcomplete.autocomplete(parser)


def _run(module: Any, arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Run a command; a user's mistake ends as one message and an exit status."""
    try:
        status = int(module.run(arguments, overrides) or 0)
        if sys.stdout is not None:
            sys.stdout.flush()  # what can't be written is an error now, not a word of the interpreter's at its end
        return status
    except Interrupted as error:
        log.error("ccnet %s: %s", arguments.command, str(error))
        return error.exit_code
    except CCNetError as error:
        return _failed(arguments.command, error)
    except ModuleNotFoundError as error:
        distribution = distribution_of(error.name)
        if distribution is None:
            raise
        return _failed(arguments.command, missing(distribution, f"ccnet {arguments.command}"))
    except KeyboardInterrupt:
        log.error("ccnet %s: interrupted", arguments.command)
        return 130
    except MemoryError:
        log.error("ccnet %s: error: not enough memory; see 'ulimit -v' and what else runs here", arguments.command)
        return 2
    except BrokenPipeError:  # whoever read the output has enough
        give_up(sys.stdout)
        return 128 + signal.SIGPIPE
    except OSError as error:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            give_up(sys.stdout)
        where = f" ({quote(error.filename)})" if error.filename else ""
        log.error("ccnet %s: error: %s%s", arguments.command, error.strerror or error, where)
        return 2


def _fill_standard_streams() -> None:
    """Open closed standard streams on nothing, before a file gets their number and takes what libraries write there."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # noqa: PERF203
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def _failed(command: str, error: CCNetError) -> int:
    log.error("ccnet %s: error: %s", command, str(error))  # as text: a record may be kept, and with it all frames
    return error.exit_code
