"""The `ccnet` command: one module a subcommand."""

import sys

from ccnet import check_packages

try:
    check_packages()
except ImportError as error:
    sys.exit(f"ccnet: error: {error}")
