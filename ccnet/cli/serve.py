"""`ccnet serve`: answer requests with a bundle over HTTP: the Open Inference Protocol, uploads, and a page for people.

Ends with 0 after SIGTERM or Ctrl-C, once every accepted request has its answer.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any, cast

from ccnet.cli.extract import add_extractor_arguments, read_options
from ccnet.cli.options import add_engine_arguments, open_localizer, options_given, positive, seconds
from runtime.backends.base import BaseBackend
from runtime.errors import ConfigError
from runtime.files import open_input
from runtime.localizer import Localizer
from runtime.serving.options import MIB, ExtractorOptions, Limits, ServerOptions

log = logging.getLogger(__name__)

TOKEN_VARIABLE = "CCNET_TOKEN"


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="answer requests over HTTP, with a page for people",
        description="Answer requests by the Open Inference Protocol, uploads of feature files and, with --extractor, "
        "of videos, and show a page for people. Prints the address once it is ready. SIGTERM or Ctrl-C ends it with "
        "exit status 0 when every accepted request has its answer.",
    )
    parser.add_argument("bundle", help="bundle folder")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only can reach it)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument(
        "--token-file", metavar="F", help=f"ask for the bearer token in this file (or in the variable {TOKEN_VARIABLE})"
    )
    parser.add_argument("--tls-cert", metavar="F", help="PEM file of the certificate chain")
    parser.add_argument("--tls-key", metavar="F", help="PEM file of its key")
    parser.add_argument(
        "--max-wait", type=seconds, default=0.0, metavar="S", help="wait for a fuller batch, at most (default: 0)"
    )
    parser.add_argument(
        "--contexts",
        type=positive,
        metavar="N",
        help="batches that the engine runs at a time (default: 2 where they can share its weights, else 1)",
    )
    parser.add_argument(
        "--queue", type=positive, default=Limits.queue, metavar="N", help="requests that wait (default: %(default)s)"
    )
    parser.add_argument(
        "--max-body", type=positive, default=Limits.body_bytes // MIB, metavar="MIB", help="default: %(default)s"
    )
    parser.add_argument(
        "--max-connections", type=positive, default=Limits.connections, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--timeout", type=seconds, default=Limits.request_seconds, metavar="S", help="for an answer (default: 60)"
    )
    parser.add_argument("--quiet", action="store_true", help="no access log")
    add_engine_arguments(parser)
    _add_video_arguments(parser)


def _add_video_arguments(parser: argparse.ArgumentParser) -> None:
    add_extractor_arguments(parser, required=False, remote=False)
    parser.add_argument(
        "--extractions", type=positive, default=1, metavar="N", help="videos that are extracted at a time (default: 1)"
    )
    parser.add_argument(
        "--max-video", type=positive, default=Limits.video_bytes // MIB, metavar="MIB", help="default: %(default)s"
    )
    parser.add_argument(
        "--video-timeout",
        type=seconds,
        default=Limits.video_seconds,
        metavar="S",
        help="for the answer to a video (default: 3600)",
    )


def run(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from runtime.serving.server import Server

    options = _options(arguments)
    if not options.is_loopback and options.token is None:
        log.warning("%s: anybody who reaches this address is answered; --token-file asks for a token", options.host)
    if not options.is_loopback and options.tls_certificate is None:
        log.warning("%s: requests and tokens can be read on the way; --tls-cert and --tls-key encrypt", options.host)
    with contextlib.ExitStack() as stack:
        localizer = stack.enter_context(open_localizer(arguments))
        more = [stack.enter_context(context) for context in _further_contexts(localizer, arguments)]
        server = Server(localizer, options, more=more)
        engine = localizer.describe()
        server.run(lambda: print(f"{server.url}: {engine['engine']} (parity check: {engine['status']})", flush=True))
    log.info("drained: every accepted request was answered")
    return 0


def _further_contexts(localizer: Localizer, arguments: argparse.Namespace) -> Iterator[BaseBackend]:
    """Yield execution contexts beside the first: such as share its weights, or else the engine loaded again."""

    def opened(localizer: Localizer) -> BaseBackend:
        return cast("BaseBackend", localizer.backends[0])  # all engines of bundles are

    for _ in range(1 if arguments.contexts is None else arguments.contexts - 1):
        fork = opened(localizer).fork()
        if fork is not None:
            yield fork
        elif arguments.contexts is not None:
            yield opened(open_localizer(arguments))


def _options(arguments: argparse.Namespace) -> ServerOptions:
    limits = Limits(
        queue=arguments.queue,
        body_bytes=arguments.max_body * MIB,
        memory_bytes=max(Limits.memory_bytes, 2 * arguments.max_body * MIB),
        connections=arguments.max_connections,
        request_seconds=arguments.timeout,
        video_bytes=arguments.max_video * MIB,
        video_seconds=arguments.video_timeout,
    )
    return ServerOptions(
        host=arguments.host,
        port=arguments.port,
        token=_token(arguments.token_file),
        tls_certificate=arguments.tls_cert,
        tls_key=arguments.tls_key,
        batch=arguments.batch,
        max_wait=arguments.max_wait,
        workers=arguments.workers,
        extractor=_extractor(arguments),
        limits=limits,
    )


def _extractor(arguments: argparse.Namespace) -> ExtractorOptions | None:
    """Return what videos need; None without an extractor. Raises ConfigError for options that need one."""
    if arguments.extractor is None:
        if given := options_given(arguments, _add_video_arguments):
            raise ConfigError(f"{', '.join(given)} goes with --extractor")
        return None
    return ExtractorOptions(
        folder=arguments.extractor,
        threads=arguments.threads,
        processes=arguments.extractions,
        read=read_options(arguments),
    )


def _token(path: str | None) -> str | None:
    """Return the token of a file, or of the environment. Raises ConfigError where the file has no text."""
    if path is None:
        return os.environ.get(TOKEN_VARIABLE)
    with open_input(path) as stream:
        content = stream.read(4096)
    try:
        return content.decode("ascii").strip()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a token; expected printable ASCII characters") from None
