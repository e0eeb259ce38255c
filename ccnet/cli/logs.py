"""What commands report on standard error: log records of this project, and Python warnings, as plain messages.

Results that a user may pipe go to standard output instead, by `print` in the command itself.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from runtime.coverage import video_list as video_list
from runtime.errors import printable
from runtime.files import give_up

_LOGGERS = ("ccnet", "runtime", "export", "benchmarks")

log = logging.getLogger(__name__)


@contextlib.contextmanager
def reporting(*, quiet: bool = False) -> Iterator[None]:
    """Send log records and warnings to standard error inside the block; `quiet` leaves out what is not a warning."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(_HANDLER)  # does nothing the second time
        logger.setLevel(logging.WARNING if quiet else logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a console may lack the letters of a class name
    with warnings.catch_warnings():
        # Not logging.captureWarnings, which logs the file and the source line of each warning too.
        warnings.showwarning = _log_warning
        yield


class _Handler(logging.Handler):
    """Writes messages to the `sys.stderr` of the moment, above a progress bar where there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is None:  # closed: print would take standard output instead
            return
        message = printable(self.format(record))
        if record.levelno == logging.WARNING:
            message = f"{_coloured('warning:', _YELLOW)} {message}"
        elif record.levelno > logging.WARNING:
            message = _coloured(message, _RED)
        tqdm = sys.modules.get("tqdm")
        try:
            if tqdm is not None:
                tqdm.tqdm.write(message, file=sys.stderr)
            else:
                print(message, file=sys.stderr, flush=True)
        except OSError:  # a full disk, a reader that is gone: the work goes on without a word
            give_up(sys.stderr)


_HANDLER = _Handler()
_RED, _YELLOW = "31", "33"


def _coloured(text: str, colour: str) -> str:
    """Return text in a colour on a terminal that can show it and a user who wants it (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stderr.isatty()
    return text if plain else f"\x1b[{colour}m{text}\x1b[0m"


def _log_warning(message: Warning | str, *_: object, **__: object) -> None:
    log.warning("%s", message)
