"""Commands run one after another in this process or in one without PyTorch, for demonstrations."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from runtime.errors import CCNetError

log = logging.getLogger(__name__)

# A process in which `import torch` fails, as on a machine that has the lean runtime only.
WITHOUT_TORCH = """import sys
sys.path[0] = sys.argv.pop(1)  # in place of the current folder
sys.modules['torch'] = None
from ccnet.cli.main import main
sys.exit(main(sys.argv[1:]))"""


class Chain:
    """The commands of a demonstration, each told with the time since its start, in one folder."""

    def __init__(self, out: Path) -> None:
        """Raises CCNetError when the folder `out` holds anything but a demonstration."""
        if out.is_dir() and any(out.iterdir()) and not (out / "annotations.json").exists():
            raise CCNetError(f"{out}: holds other files; give --out a new folder")
        self.out = out
        self._begun = time.perf_counter()

    def command(self, *words: object, torch: bool = True) -> None:
        """Run `ccnet ...`; `torch=False`: in a process of its own in which PyTorch can't be imported.

        Raises CCNetError when it fails; the command has reported why.
        """
        from ccnet.cli.main import main

        argv = [str(word) for word in words]
        self.log(f"ccnet {' '.join(argv)}" + ("" if torch else "      (PyTorch can't be imported here)"))
        if torch:
            status = main(argv)
        else:
            ours = str(Path(__file__).resolve().parents[2])
            process = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, ours, *argv], env=os.environ, check=False)
            status = process.returncode
        if status:
            raise CCNetError(f"ccnet {argv[0]} ended with exit status {status}, expected 0")

    def log(self, line: str) -> None:
        """Tell what comes next on standard error."""
        sys.stdout.flush()  # in a file that both streams go to, the order stays
        log.info("\n[%5.1f s] %s", time.perf_counter() - self._begun, line)
