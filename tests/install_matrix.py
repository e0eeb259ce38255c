"""Install the wheel into fresh environments, with the oldest and the newest packages it allows, and use it there.

python tests/install_matrix.py WHEEL PYTHON ... [--extras cpu,openvino,serve] [--resolution lowest-direct highest]

For each interpreter and each end of the allowed versions: a new environment (by `uv`, which has to be on the PATH), and
in it the commands of the runtime on a tiny bundle, through every engine that the extras bring. Run it where the `dev`
extra is installed: it makes the bundle. Exit status 1 when anything failed. Not part of the test suite: it downloads.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from builders import LABELS, engine, features_with, make_bundle, write_features

from runtime.files import write_json

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
RESOLUTIONS = ("lowest-direct", "highest")
COMMANDS = (
    "--version",
    "inspect bundle",
    "doctor",
    "predict bundle --features features --out events.jsonl --backend {backend}",
    "evaluate events.jsonl --annotations annotations.json",
)


def make_inputs(folder: Path, backends: list[str]) -> None:
    """Write a bundle, features in which two events are found, and their annotations."""
    make_bundle(folder / "bundle", [engine(backend) for backend in backends])
    (folder / "features").mkdir()
    write_features(folder / "features", "v", features_with(30, [(3, 8, 1, 3.0), (12, 20, 0, 3.0)]))
    events = [
        {"segment": [start + 0.5, end + 0.5], "label": LABELS[label], "label_id": label}
        for start, end, label in ((3, 8, 1), (12, 20, 0))
    ]
    others = [{"segment": [1.0, 2.0], "label": label, "label_id": index} for index, label in enumerate(LABELS)]
    database = {
        "v": {"duration": 30.0, "subset": "test", "annotations": events},
        "other": {"duration": 30.0, "subset": "train", "annotations": others},
    }
    write_json(folder / "annotations.json", {"version": "1", "database": database})


def attempt(folder: Path, wheel: Path, python: str, extras: str, resolution: str, backends: list[str]) -> str:
    """Install and use the wheel. Returns the versions that were installed; raises CalledProcessError."""
    environment = folder / f"env-{Path(python).parent.parent.name}-{resolution}"
    call("uv", "venv", "--quiet", "--python", python, environment)
    pip = ("uv", "pip", "--quiet")
    target = ("--python", environment / "bin" / "python")
    # "Direct" are the packages that pyproject.toml names. Wheels only: to compile an old release shows nothing.
    wanted = ("-r", PROJECT, *(word for extra in extras.split(",") for word in ("--extra", extra)))
    call(*pip, "install", *target, "--only-binary", ":all:", "--resolution", resolution, *wanted)
    call(*pip, "install", *target, "--no-deps", wheel)
    frozen = call(*pip, "freeze", *target).split()
    for backend in backends:
        for command in COMMANDS:
            words = command.format(backend=backend).split()
            call(environment / "bin" / "python", "-W", "error", "-m", "ccnet", *words, cwd=folder)
    direct = ("numpy", "orjson", "onnxruntime", "openvino", "starlette", "uvicorn", "pyarrow", "fsspec", "av", "pillow")
    return ", ".join(line.replace("==", " ") for line in frozen if line.partition("==")[0] in direct)


def call(*command: object, cwd: Path | None = None) -> str:
    words = [str(word) for word in command]
    return subprocess.run(words, check=True, capture_output=True, text=True, cwd=cwd).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("python", nargs="+", help="interpreters, by path or version")
    parser.add_argument("--extras", default="cpu,openvino,parquet,serve,remote,video")
    parser.add_argument("--resolution", nargs="+", default=RESOLUTIONS, choices=RESOLUTIONS)
    arguments = parser.parse_args()
    backends = [name for name, extra in (("onnxruntime", "cpu"), ("openvino", "openvino")) if extra in arguments.extras]
    failed = 0
    for python in arguments.python:
        for resolution in arguments.resolution:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                make_inputs(folder, backends)
                try:
                    found = attempt(folder, arguments.wheel.resolve(), python, arguments.extras, resolution, backends)
                    print(f"{python} {resolution}: works with {found}", flush=True)
                except subprocess.CalledProcessError as error:
                    failed += 1
                    print(f"{python} {resolution}: FAILED: {' '.join(error.cmd)}\n{error.stderr}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
