"""Where the compiled kernels are, and how they are built: by the wheel, or by a source checkout on first use.

The library needs no Python header and no Python version: it is plain C, loaded through ctypes. Its file name carries
a hash of the sources, so that one of other sources is never loaded. Needs the standard library only: the build backend
imports this module before anything is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent

FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-shared", "-s", "-fvisibility=hidden", "-fno-sanitize=undefined"),
    # The same bits on every machine: no multiply-add is fused unless the code says so.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)

ZIG_TARGETS = {"x86_64": "x86_64-linux-gnu.2.17", "aarch64": "aarch64-linux-gnu.2.17"}
"""Without a target zig builds for the very processor and C library of this machine."""


class BuildError(Exception):
    """The kernels can't be compiled; the message says what to do."""


def library_path() -> Path:
    """Return the path of the library that belongs to the sources as they are, whether it has been built or not."""
    digest = hashlib.sha256(repr(FLAGS).encode())
    for source in sorted([*FOLDER.glob("*.h"), *FOLDER.glob("*.c")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return FOLDER / f"ccnet-{sysconfig.get_platform()}-{digest.hexdigest()[:16]}.so"


def build() -> Path:
    """Compile the kernels beside their sources, unless that has been done, and return the library's path.

    Libraries of other sources are removed. Any number of processes may build at once. Raises BuildError.
    """
    path = library_path()
    if path.exists():
        return path
    compiler = find_compiler()
    if compiler is None:
        raise BuildError(
            f"{FOLDER}: the kernels are not compiled, and this machine has no working C compiler; "
            "install from the source folder by 'pip install .', which brings one for the build, or install gcc"
        )
    sources = [str(source) for source in sorted(FOLDER.glob("*.c"))]
    try:
        with tempfile.TemporaryDirectory(dir=FOLDER, prefix=".build-") as folder:
            output = Path(folder) / path.name
            done = _run([*compiler, *FLAGS, *sources, "-o", str(output), "-lm"])
            if done.returncode != 0:
                raise BuildError(f"{FOLDER}: {shlex.join(compiler)} can't compile the kernels:\n{done.stderr}")
            os.replace(output, path)
    except OSError as error:
        raise BuildError(f"{FOLDER}: the kernels are not compiled, and can't be here ({error.strerror})") from error
    for other in FOLDER.glob("ccnet-*.so"):
        if other != path:
            other.unlink(missing_ok=True)
    return path


def find_compiler() -> list[str] | None:
    """Return the command of a C compiler that works: $CC, the system's, or the one in the package `ziglang`."""
    candidates = [shlex.split(os.environ.get("CC", "")), ["cc"], ["gcc"], ["clang"]]
    if importlib.util.find_spec("ziglang") is not None:
        target = ZIG_TARGETS.get(platform.machine()) if sys.platform == "linux" else None
        extra = ["-target", target, "-mcpu=baseline"] if target else []
        candidates.append([sys.executable, "-m", "ziglang", "cc", *extra])
    return next((command for command in candidates if command and _works(command)), None)


def _works(compiler: list[str]) -> bool:
    """Return whether a compiler makes a shared library: one without the C library's headers does not."""
    if shutil.which(compiler[0]) is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.c"
        source.write_text("#include <math.h>\n#include <sys/uio.h>\ndouble probe(double x) { return floor(x); }\n")
        command = [*compiler, "-shared", "-fPIC", str(source), "-o", str(Path(folder) / "probe.so"), "-lm"]
        return _run(command).returncode == 0


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
