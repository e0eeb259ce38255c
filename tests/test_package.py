"""The distribution: what a wheel and a source archive hold, and facts that are stated in more than one file."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest

import ccnet
from runtime.packages import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ccnet", "export", "runtime")
BUILT = {".so", ".pyc"}
UNPACKED = {".venv", ".git", "build", "dist", "demo", "__pycache__"}


def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return table


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, and the wheel that was built from what the archive holds."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        version = "0"
    if int(version.partition(".")[0]) < 77:
        pytest.skip(f"building needs setuptools 77 or newer, found {version}")
    folder = tmp_path_factory.mktemp("distribution")
    ignored = shutil.ignore_patterns(*UNPACKED, "*.egg-info", "*.so", ".*_cache")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    build(folder / "source", "build_sdist", folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    build(unpacked, "build_wheel", folder)
    return folder


def build(source: Path, hook: str, out: Path) -> None:
    """Call a hook of the build backend as pip does, in a process of its own."""
    code = f"import build_backend; build_backend.{hook}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def sources() -> set[str]:
    """Return the files of the packages, by their path from the root."""
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    return {
        str(path.relative_to(ROOT))
        for path in files
        if path.suffix not in BUILT and not any(part.startswith((".", "__pycache__")) for part in path.parts)
    }


def test_the_wheel_holds_every_file_of_the_packages_and_the_kernels(distribution: Path) -> None:
    (wheel,) = distribution.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    (library,) = (name for name in names if name.endswith(".so"))
    assert library.startswith("runtime/kernels/ccnet-")
    assert names - {library} == sources()
    assert wheel.name.startswith(f"ccnet-{ccnet.__version__}-py3-none-linux")


def test_the_source_archive_holds_what_building_testing_and_documenting_need(distribution: Path) -> None:
    (unpacked,) = (distribution / "unpacked").iterdir()
    names = ("build_backend.py", "constraints.txt", "LICENSE", "Makefile", "mkdocs.yml", "CHANGELOG.md", "SECURITY.md")
    for name in names:
        assert (unpacked / name).is_file(), name
    for folder in ("tests", "docs", "examples", "benchmarks", "containers"):
        present = {path.name for path in (unpacked / folder).iterdir()}
        expected = {path.name for path in (ROOT / folder).iterdir() if path.name != "__pycache__"}
        assert present == expected, folder
    assert not list(unpacked.rglob("*.pyc"))


def test_the_wheel_states_what_pyproject_says(distribution: Path) -> None:
    (wheel,) = distribution.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(file.read(name).decode())
        assert any(name.endswith("licenses/LICENSE") for name in file.namelist())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Version"] == ccnet.__version__
    assert {*metadata.get_all("Provides-Extra", [])} == {*project()["project"]["optional-dependencies"]}
    readme = str(metadata.get_payload())
    assert readme.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


@pytest.mark.parametrize("command", [("twine", "check", "--strict"), ("check_wheel_contents",)], ids=lambda c: c[0])
def test_the_checks_of_the_package_index_pass(command: tuple[str, ...], distribution: Path) -> None:
    pytest.importorskip(command[0])
    files = [*distribution.glob("*.whl"), *(distribution.glob("*.tar.gz") if command[0] == "twine" else ())]
    done = subprocess.run(
        [sys.executable, "-m", *command, *map(str, files)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_version_is_stated_once_and_its_copies_agree() -> None:
    assert project()["project"]["dynamic"] == ["version"]
    assert f"\nversion: {ccnet.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert released[0] == ccnet.__version__


def test_the_gpu_extra_brings_the_cuda_libraries_of_onnx_runtime() -> None:
    """Without them its CUDA provider does not start, unless torch or a CUDA toolkit is there."""
    requirements = project()["project"]["optional-dependencies"]["gpu"]
    (wanted,) = (r for r in requirements if r.startswith("onnxruntime-gpu"))
    assert re.match(r"onnxruntime-gpu\[cuda,cudnn\][<>=]", wanted)


def test_every_extra_that_an_error_names_exists_and_brings_its_package() -> None:
    extras = project()["project"]["optional-dependencies"]
    for distribution, extra in EXTRAS.items():
        names = {re.split(r"[<>=\[; ]", requirement)[0] for requirement in extras[extra]}
        assert distribution in names, f"{distribution} in [{extra}]"


def test_every_requirement_has_a_lower_bound() -> None:
    extras = project()["project"]["optional-dependencies"]
    requirements = [*project()["project"]["dependencies"], *(r for extra in extras.values() for r in extra)]
    assert [r for r in requirements if ">=" not in r and not r.startswith("ccnet[")] == []


def test_hooks_run_the_targets_of_make_check() -> None:
    """Run by `pre-commit`, the checks are those of CI."""
    targets = re.search(r"^check: ([\w ]+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert targets is not None
    hooks = re.findall(r"entry: make (\w+)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert hooks == targets[1].split()


@pytest.mark.parametrize("path", sorted((ROOT / "containers").glob("*.Dockerfile")), ids=lambda path: path.name)
def test_containers_run_a_command_that_exists(path: Path) -> None:
    from ccnet.cli.main import make_parser

    text = path.read_text(encoding="utf-8")
    command = re.search(r"^CMD (\[.*\])", text, re.MULTILINE)
    assert command is not None
    parser, _ = make_parser()
    assert parser.parse_args(json.loads(command[1])).command == "serve"
    (extras,) = re.findall(r"\[([a-z,]+)\]\"", text)
    assert {*extras.split(",")} <= {*project()["project"]["optional-dependencies"]}
