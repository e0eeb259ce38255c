"""Shared fixtures: the reference data beside a checkout, and what takes long to make."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from builders import Exported, random_network, shared_path
from fuzzing import COUNT, LIMITS, Attack, Limits, Mutate
from fuzzing import attack as fuzzing_attack
from fuzzing import table as fuzzing_table
from tensorrt_simulation import Simulation, install, write_engine

if TYPE_CHECKING:
    from benchmarks.networks import Networks
    from export.extractors import bundle
    from runtime.video.extractor import Extractor


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the files with slow tests first: one that starts last would keep one process busy and the others idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what `make soak` read, which the tests of tests/test_fuzz*.py hand on."""
    reports = [report for state in ("passed", "failed") for report in terminalreporter.getreports(state)]
    rows = [value for report in reports for name, value in report.user_properties if name == "fuzz"]
    if rows and "CCNET_FUZZ" in os.environ:
        terminalreporter.section("mutations of files")
        for line in fuzzing_table(rows):
            terminalreporter.line(line)


@pytest.fixture
def attack(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Attack:
    """Read mutations; the numbers go to the table at the end of the session, and a fault fails the test."""
    reader = request.node.name.removeprefix("test_")

    def run(
        read: Callable[[Path], object],
        path: Path,
        mutate: Mutate,
        *,
        share: float = 1.0,
        name: str = "",
        limits: Limits = LIMITS,
    ) -> None:
        row, found = fuzzing_attack(name or reader, read, path, mutate, round(COUNT * share), limits)
        record_property("fuzz", row.to_json())
        assert not found, "\n".join(f"{kind}: {example}" for kind, example in found.items())

    return run


@pytest.fixture(scope="session")
def annotations_file() -> Path:
    """The published UnAV-100 annotation file."""
    return shared_path("data/unav100_annotations.json")


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes of this session share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "session"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_networks(session_folder: Path) -> Networks:
    """The benchmarks' tiny network. A graph takes many seconds to export, so every test takes it from `tiny_graph`."""
    from benchmarks.networks import Networks, benchmark_config

    return Networks(session_folder / "tiny", benchmark_config("tiny"))


@pytest.fixture(scope="session")
def tiny_graph(tiny_networks: Networks) -> Callable[[str], Path]:
    """The ONNX file of a form of the tiny network (see `Networks.graph`), exported by the first process that asks."""
    from filelock import FileLock

    def graph(form: str) -> Path:
        tiny_networks.folder.mkdir(exist_ok=True)
        with FileLock(tiny_networks.folder / "checkpoint.lock"):
            assert tiny_networks.checkpoint.is_dir()
        with FileLock(tiny_networks.folder / f"{form}.lock"):
            return tiny_networks.graph(form)

    return graph


@pytest.fixture(scope="session")
def six_levels(session_folder: Path) -> Exported:
    """A network of as many levels as the published one, whose graph has as many nodes, with small weights."""
    from filelock import FileLock

    from ccnet.config import Config, ModelConfig
    from export.fused.network import fused_network
    from export.graph.to_onnx import export_onnx

    config = Config(
        model=ModelConfig(length=64, visual_dim=12, audio_dim=8, dim=16, num_classes=3, head_dim=16, tdm_dim=8)
    )
    network, spec = random_network(config.model), config.spec(("a", "b", "c"))
    path = session_folder / "six_levels.onnx"
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            export_onnx(fused_network(network), spec, path, max_batch=4)
    return Exported(network, spec, path)


@pytest.fixture(scope="session")
def extractor_networks() -> bundle.Networks:
    """Small networks of an extractor, whose features differ from window to window."""
    import numpy as np

    from export.extractors.seeded import calibrate, seeded_networks

    networks = seeded_networks(0)
    windows = np.random.default_rng(0).integers(0, 256, (2, 25, 16, 16, 3), np.uint8).repeat(8, 2).repeat(8, 3)
    calibrate(networks, networks.spec(side=128, crop=64, iterations=1), windows)
    return networks


@pytest.fixture(scope="session")
def extractor(extractor_networks: bundle.Networks, session_folder: Path) -> Extractor:
    """An extractor of reduced width; its graphs take many seconds to export, so one process does it."""
    from filelock import FileLock

    from export.extractors.bundle import make_extractor
    from export.extractors.seeded import weight_hashes
    from runtime.video.extractor import read_extractor

    folder = session_folder / "extractor"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            spec = extractor_networks.spec(side=128, crop=64, iterations=1)
            make_extractor(extractor_networks, spec, weight_hashes(extractor_networks), folder)
    return read_extractor(folder)


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> Simulation:
    """TensorRT and CUDA as stand-ins."""
    simulation = Simulation()
    install(monkeypatch, simulation)
    return simulation


@pytest.fixture
def engine_path(tmp_path: Path) -> Path:
    """An engine of the stand-in."""
    return write_engine(tmp_path / "bundle" / "e.engine")
