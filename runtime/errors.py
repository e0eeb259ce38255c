"""Every error the toolkit raises for a user's mistake or a missing piece, in one tree.

A message says which file or tensor, what was received, what was expected, and what to do next.
The command line turns any `CCNetError` into that message and exit status `exit_code`, without a traceback.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """Return text with everything escaped that is neither printable nor a line break."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class CCNetError(Exception):
    """Base of all errors raised on purpose by `runtime`, `ccnet` and `export`.

    A message may quote files: control characters in it, such as those that move a terminal's cursor, are escaped.
    """

    exit_code = 2

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class FeatureError(CCNetError):
    """A feature file or array can't be used: missing, truncated, wrong rank, dtype, width, or not finite."""


class VideoError(CCNetError):
    """A video file can't be used: no picture, no sound, too short, no time stamps, or no video at all."""


class AnnotationError(CCNetError):
    """An annotation file is invalid: not JSON, wrong structure, end <= start, unknown label, duplicate id."""


class PredictionError(CCNetError):
    """A file of predicted events is invalid, or does not fit the annotations it is scored against."""


class ConfigError(CCNetError):
    """A configuration key is unknown, or its value is out of range or of the wrong type."""


class CheckpointError(CCNetError):
    """A checkpoint is missing, damaged, or belongs to another configuration."""


class TrainingError(CCNetError):
    """Training can't go on: its loss is no longer finite, or its device can't do what was asked."""


class Interrupted(CCNetError):
    """A job was asked to stop (Ctrl-C, SIGTERM) and kept what it had; the message says where."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class VideoFailed(CCNetError):
    """A run that stops at the first bad video met one."""

    exit_code = 1


class WorkerDied(CCNetError):
    """The process that worked on a video of a corpus run died of it, more than once."""


class BundleError(CCNetError):
    """A bundle is missing, altered or half written, or its manifest can't be read."""


class BackendUnavailable(CCNetError):
    """The engine library, provider or device that was asked for is not there."""


class MissingDependency(BackendUnavailable):
    """An optional package is not installed. The message names the pip extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}': pip install 'ccnet[{extra}]'")
        self.package = package
        self.extra = extra


class InstallationError(CCNetError):
    """A part of the installation is missing: the compiled kernels are not there and can't be built."""


class EngineMismatch(CCNetError):
    """An engine was built for another library version, GPU or compute capability than this machine has."""


class EngineError(CCNetError):
    """An engine failed while it was loaded or run; the message carries the library's own log."""


class RequestError(CCNetError):
    """A request to a server can't be answered: it is malformed, too large, or comes when there is no room."""

    def __init__(self, message: str, *, status: int = 400, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status code."""
        self.retry_after = retry_after
        """Seconds."""


class ExportError(CCNetError):
    """The network could not be exported or an engine could not be built."""


class ReferenceFileError(CCNetError):
    """A file of reference outputs is missing, damaged, or of another network; it says nothing about an engine."""


class ParityError(CCNetError):
    """An engine does not compute what the eager model computes, within the tolerances of its precision."""

    exit_code = 3
