"""The console command `ccnet`: declares the subcommands; each imports what it needs only when it runs."""

from __future__ import annotations

import argparse
import importlib
import sys

from runtime.errors import CCNetError, MissingDependency

COMMANDS = (
    "demo",
    "synthesize",
    "train",
    "import_weights",
    "export",
    "verify",
    "reference",
    "predict",
    "evaluate",
    "inspect",
    "bench",
    "doctor",
)
"""One module each in `ccnet.cli`: `register(subparsers)` declares it, `run(arguments, overrides)` does it."""

RENAMED = {"plant": "synthesize"}
"""Former names of subcommands, which this release still understands."""

# Packages that only some subcommands need, and the extra that brings each.
_EXTRAS = {
    "torch": "train",
    "safetensors": "train",
    "tensorboard": "train",
    "matplotlib": "train",
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "cpu",
    "openvino": "openvino",
    "pyarrow": "parquet",
    "polygraphy": "export",
    "tensorrt": "gpu",
    "cuda": "gpu",
    "tensorrt_rtx": "rtx",
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand. Returns 0, a `CCNetError.exit_code`, or 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in RENAMED:
        name = RENAMED[argv[0]]
        print(f"warning: 'ccnet {argv[0]}' is called 'ccnet {name}' now; the old name will go", file=sys.stderr)
        argv[0] = name
    parser = argparse.ArgumentParser(
        prog="ccnet", description="Train, export, verify and run CCNet, the dense audio-visual event localizer."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        importlib.import_module(f"ccnet.cli.{name}").register(subparsers)
    arguments, rest = parser.parse_known_args(argv)
    module = importlib.import_module(f"ccnet.cli.{arguments.command.replace('-', '_')}")
    if rest and not getattr(module, "TAKES_OVERRIDES", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(module.run(arguments, rest) or 0)
    except CCNetError as error:
        print(f"ccnet {arguments.command}: error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        missing = MissingDependency(package, _EXTRAS[package], f"ccnet {arguments.command}")
        print(f"ccnet {arguments.command}: error: {missing}", file=sys.stderr)
        return missing.exit_code
    except KeyboardInterrupt:
        print(f"ccnet {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"ccnet {arguments.command}: error: {error.strerror or error}{where}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
