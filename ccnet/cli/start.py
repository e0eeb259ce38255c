"""The entry of the console command: Ctrl-C while modules still load ends as it does later, with one line."""

from __future__ import annotations

import sys


def start() -> int:
    """Load and run the command line. Return its exit status: that of `ccnet.cli.main.main`, or 130 after Ctrl-C."""
    try:
        from ccnet.cli.main import main  # loading it takes most of a second

        return main()
    except KeyboardInterrupt:
        print("ccnet: interrupted", file=sys.stderr)
        return 130
