"""Options that several commands share: numbers that the parser checks, and the choice of an engine."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ccnet.config import PRESETS, Config, parse_overrides
from ccnet.settings import RUN_KEYS, SettingsFile, read_settings
from runtime.annotations import Annotations
from runtime.backends.registry import BACKENDS
from runtime.backends.select import OnMismatch
from runtime.coverage import report_gaps
from runtime.errors import ConfigError, printable
from runtime.files import check_output_file, write_json
from runtime.folders import check_output_folder
from runtime.localizer import Localizer
from runtime.pipeline import LongVideos
from runtime.schema import quote

if TYPE_CHECKING:
    from runtime.evaluation import FoundEvents

log = logging.getLogger(__name__)

CLASSES_HELP = (
    "class names in the order of their ids, where the annotation file lacks some: a bundle, a checkpoint, a whole "
    "annotation file, or a file with a name a line"
)


def positive(text: str) -> int:
    """Parse an integer of 1 or more."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of 1 or more")
    return value


def seconds(text: str) -> float:
    """Parse a finite number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected seconds, 0 or more")
    return value


def output_file(text: str) -> str:
    """Take the name of a file to write, `-` for standard output; a bad one is refused before the work."""
    with _refusing(text):
        check_output_file(text)
    return text


def output_folder(text: str) -> str:
    """Take the name of a folder to fill; a bad one is refused before the work. A link to nothing is followed."""
    with _refusing(text):
        check_output_folder(text)
    return text if os.path.exists(text) else os.path.realpath(text) if os.path.islink(text) else text


def replaced_folder(text: str) -> str:
    """Take the name of a folder that is replaced as a whole; a bad one is refused before the work."""
    with _refusing(text):
        check_output_folder(text, replaced=True)
    return text


@contextlib.contextmanager
def _refusing(text: str) -> Iterator[None]:
    """Say to the parser what is wrong with the name of an output."""
    try:
        yield
    except (OSError, ValueError) as error:
        where = quote(getattr(error, "filename", None) or text)
        message = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"{message} ({where})" if where else str(message)) from None


def quoted_path(path: str | Path) -> str:
    """Return a path as a shell takes it, in a command that is printed to be run; never as an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """Declare `--json`; the command prints by `print_result`."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def print_text(text: str) -> None:
    """Print a result: control characters of names in it are escaped. Raises OSError where standard output is closed."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, "can't print the result: standard output is closed")
    print(printable(text))


def print_result(arguments: argparse.Namespace, record: Mapping[str, Any], text: str) -> None:
    """Print the result of a command: `record` with `--json`, else `text`."""
    print_text(json.dumps(record, indent=2) if arguments.json else text)


def add_json_output(parser: argparse.ArgumentParser) -> None:
    """Declare `--json [OUT]`, for results that people read and keep; the command prints by `print_or_write`."""
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        type=output_file,
        metavar="OUT",
        help="print the result as JSON; with OUT, write it there as well as printing the text",
    )


def print_or_write(arguments: argparse.Namespace, record: Mapping[str, Any], text: str) -> None:
    """Print the result of a command: `record` with `--json`, else `text`, with `record` in the file of `--json OUT`."""
    if arguments.json == "-":
        print_text(json.dumps(record, indent=2))
        return
    if arguments.json:
        write_json(arguments.json, record)
    print_text(text)
    if arguments.json:
        log.info("%s written", arguments.json)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what says which network on which data: `read_config` takes it, from the command line or a file."""
    parser.add_argument(
        "--config", metavar="FILE", help="TOML or YAML file with any of these options, and settings; options go first"
    )
    parser.add_argument("--preset", metavar="P", help=f"one of {', '.join(PRESETS)}; 'ccnet presets' explains them")
    parser.add_argument("--annotations", metavar="F", help="annotation file")
    parser.add_argument("--classes", metavar="C", help=CLASSES_HELP)
    parser.add_argument("--features", metavar="DIR", help="folder of .npy feature files")


def read_config(arguments: argparse.Namespace, overrides: list[str]) -> Config:
    """Return the configuration of the command line; what a file of `--config` says otherwise goes into `arguments`.

    Raises ConfigError for an option of `ccnet.settings.RUN_KEYS` that the command has and that is given nowhere.
    """
    settings = read_settings(arguments.config) if arguments.config else SettingsFile(Path(), {}, {})
    for key in RUN_KEYS:
        if not hasattr(arguments, key):
            continue
        if getattr(arguments, key) is None:
            setattr(arguments, key, settings.run.get(key))
        if getattr(arguments, key) is None and key != "classes":
            where = f"give it here or as '{key}' in {arguments.config}" if arguments.config else "it has no default"
            raise ConfigError(f"--{key} is missing: {where}")
    if arguments.config and hasattr(arguments, "out"):  # on the command line the parser looks at it
        check_output_folder(arguments.out)
    return settings.config(arguments.preset, parse_overrides(overrides))


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that choose an engine and say how to run it; `open_localizer` takes them."""
    parser.add_argument("--backend", default="auto", choices=("auto", *BACKENDS), help="default: the fastest verified")
    parser.add_argument("--precision", metavar="P", help="only this precision (fp32, tf32, bf16, fp16, int8, fp8)")
    parser.add_argument("--batch", type=positive, metavar="N", help="videos per engine call")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of the engine")
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="threads that read, and as many that post-process"
    )
    parser.add_argument(
        "--long-videos",
        choices=get_args(LongVideos),
        default="crop",
        help="videos longer than T: keep the first T steps (the paper), or overlapping windows (default: crop)",
    )
    parser.add_argument(
        "--window-overlap", type=float, default=0.5, metavar="SHARE", help="of neighbouring windows (default: 0.5)"
    )
    parser.add_argument(
        "--on-mismatch",
        choices=get_args(OnMismatch),
        default="error",
        help="an engine made for another library version or GPU: fail (default; 'ccnet rebuild' helps), or run the "
        "ONNX file",
    )


def check_windows(arguments: argparse.Namespace) -> None:
    """Raise ConfigError where windows are described and none are asked for."""
    if arguments.long_videos != "windows" and "--window-overlap" in engine_options_given(arguments):
        raise ConfigError("--window-overlap: only with --long-videos windows; without, there are none")


def options_given(arguments: argparse.Namespace, declare: Callable[[argparse.ArgumentParser], None]) -> list[str]:
    """Return those of the options that `declare` adds to a parser that are not at their defaults."""
    parser = argparse.ArgumentParser()
    declare(parser)
    defaults = vars(parser.parse_args([]))
    return [f"--{name.replace('_', '-')}" for name, value in defaults.items() if getattr(arguments, name) != value]


def engine_options_given(arguments: argparse.Namespace) -> list[str]:
    """Return those of the options of `add_engine_arguments` that are not at their defaults."""
    return options_given(arguments, add_engine_arguments)


def open_localizer(arguments: argparse.Namespace, bundle: str | Path | None = None) -> Localizer:
    """Load a bundle, by default `arguments.bundle`, as the engine options of the command line say."""
    check_windows(arguments)
    return Localizer.load(
        bundle or arguments.bundle,
        arguments.backend,
        precision=arguments.precision,
        on_mismatch=arguments.on_mismatch,
        threads=arguments.threads,
        long_videos=arguments.long_videos,
        window_overlap=arguments.window_overlap,
    )


def find_subset_events(
    arguments: argparse.Namespace, bundle: str | Path, features: str | Path, annotations: Annotations
) -> FoundEvents:
    """Run a bundle on the subset that the command line names, and log what features do not cover."""
    from runtime.evaluation import find_events  # most commands with these options do without

    videos = annotations.subset(arguments.subset)
    with open_localizer(arguments, bundle) as localizer:
        found = find_events(
            localizer,
            features,
            videos,
            batch_size=arguments.batch,
            workers=arguments.workers,
            quiet=arguments.quiet,
        )
        report_gaps(found.gaps, len(videos), localizer.spec.time_base)
    return found
