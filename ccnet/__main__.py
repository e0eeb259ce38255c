"""`python -m ccnet`: the console command.

`-m` has Python look for every module in the current folder first; here it looks where `ccnet` was found instead, so
that a user's `runtime.py` or `json.py` is not taken for ours.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from ccnet.cli.start import start  # noqa: E402

sys.exit(start())
