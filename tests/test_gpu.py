"""On an NVIDIA GPU: engines against their reference, graphs against plain runs, threads, leaks, foreign engines.

The attention network of `builders.py` is built here for every precision that the installed libraries have. The real
one comes from outside, made where torch is: CCNET_GPU_BUNDLE names a bundle with ONNX graphs (opset 17 for TensorRT
8.6), CCNET_GPU_REFERENCE the file that `ccnet reference` recorded for the same checkpoint. Runs on Python 3.10 with
numpy and TensorRT, without torch; without onnx too, if CCNET_GPU_GRAPHS names a folder that
`python tests/builders.py FOLDER` has filled. Skips, saying why, where there is no GPU.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import ATTENTION_SPEC, attention_outputs, write_attention_onnx

from benchmarks.gpu.stages import build_here, check_engine_file
from export.tensorrt.build import EngineInfo
from export.tensorrt.options import EngineOptions
from runtime.backends.tensorrt import cuda
from runtime.backends.tensorrt.backend import TensorRTBackend
from runtime.backends.tensorrt.context import RunOptions
from runtime.bundle import ModelFile, read_bundle
from runtime.errors import BackendUnavailable, BundleError, EngineError, EngineMismatch, ExportError

pytestmark = pytest.mark.gpu

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
# Outputs of the attention network lie within +-10. fp32 differs in the order of sums; half types carry 11 and 8 bits
# (fp16 on a CPU: 8e-4 off; the rest is room for other kernels). A wrong length or layout is off by more than 1.
TOLERANCE = {"fp32": 2e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1.5e-1}
MAX_BATCH = 8


@pytest.fixture(scope="session")
def device() -> cuda.Device:
    try:
        return cuda.probe()
    except BackendUnavailable as error:
        pytest.skip(f"no GPU: {error}")


@pytest.fixture(scope="session", params=list(MODULES))
def format(request: pytest.FixtureRequest, device: cuda.Device) -> str:
    name = str(request.param)
    if importlib.util.find_spec(MODULES[name]) is None:
        pytest.skip(f"{MODULES[name]} is not installed")
    return name


@pytest.fixture(scope="session", params=list(TOLERANCE))
def built(
    request: pytest.FixtureRequest, format: str, device: cuda.Device, tmp_path_factory: pytest.TempPathFactory
) -> EngineInfo:
    """An engine of the attention network for this GPU."""
    precision = str(request.param)
    folder = tmp_path_factory.mktemp(f"{format}-{precision}")
    graph = small_graph("fp32" if precision == "tf32" else precision, folder)
    info = build_for_this_gpu(graph, folder / "small.engine", format, precision)
    try:
        TensorRTBackend.open(info.path, model_file_of(info), ATTENTION_SPEC).close()
    except EngineMismatch as error:
        pytest.skip(str(error))  # a portable RTX engine on a GPU that RTX does not know
    return info


def small_graph(precision: str, folder: Path) -> Path:
    """Write the graph here, or take the one in CCNET_GPU_GRAPHS."""
    if prepared := os.environ.get("CCNET_GPU_GRAPHS"):
        return Path(prepared) / f"{precision}.onnx"
    pytest.importorskip("onnx", reason="onnx is not installed, and CCNET_GPU_GRAPHS names no folder with the graphs")
    return write_attention_onnx(folder / "model.onnx", precision)


def build_for_this_gpu(graph: Path, out: Path, format: str, precision: str) -> EngineInfo:
    """Build an engine; skip where this library version lacks the precision."""
    try:
        chosen: Any = {"format": format, "precision": precision}
        return build_here(graph, out, EngineOptions(**chosen, profile=(1, 4, MAX_BATCH)))
    except ExportError as error:
        if "does not support" in str(error):
            pytest.skip(str(error))
        raise


def model_file_of(info: EngineInfo) -> ModelFile:
    return info.model_file(name=f"{info.options.format}-{info.options.precision}")


@pytest.fixture
def small(built: EngineInfo) -> Iterator[TensorRTBackend]:
    with TensorRTBackend.open(built.path, model_file_of(built), ATTENTION_SPEC) as backend:
        yield backend


def stress(batch: int, seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return inputs of the attention network that are hard: few and all steps, silence, large and tiny values."""
    draw = np.random.default_rng(seed)
    shapes = ATTENTION_SPEC.input_shapes(batch)
    visual, audio = (draw.standard_normal(shapes[name], dtype=np.float32) for name in ("visual", "audio"))

    def lengths(*steps: int) -> np.ndarray:
        return np.resize(np.array(steps, np.int32), batch)

    return {
        "full": (visual, audio, lengths(ATTENTION_SPEC.length)),
        "mixed lengths": (visual, audio, lengths(ATTENTION_SPEC.length, 17, 2)),
        "one step": (visual, audio, lengths(1)),
        "silence": (visual, np.zeros_like(audio), lengths(20)),
        "large": (visual * 100, audio * 100, lengths(ATTENTION_SPEC.length, 9)),
        "tiny": (visual * 1e-3, audio * 1e-3, lengths(30)),
    }


def assert_close(backend: TensorRTBackend, arrays: tuple[np.ndarray, ...], name: str = "") -> None:
    for got, want in zip(backend.infer(*arrays), attention_outputs(*arrays), strict=True):
        assert np.isfinite(got).all(), name
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[backend.precision], err_msg=name)


@pytest.mark.parametrize("batch", [1, 3, MAX_BATCH])
def test_engine_against_reference(small: TensorRTBackend, batch: int) -> None:
    for name, arrays in stress(batch).items():
        assert_close(small, arrays, name)


def test_cuda_graph_against_plain_run(built: EngineInfo) -> None:
    model_file = model_file_of(built)
    with (
        TensorRTBackend.open(built.path, model_file, ATTENTION_SPEC) as replayed,
        TensorRTBackend.open(built.path, model_file, ATTENTION_SPEC, running=RunOptions(cuda_graph=False)) as plain,
    ):
        for batch in (1, 4, MAX_BATCH):
            for name, arrays in stress(batch, seed=batch).items():
                for got, want in zip(replayed.infer(*arrays), plain.infer(*arrays), strict=True):
                    # the same kernels on the same numbers
                    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE["fp32"] / 10, err_msg=name)
        assert set(replayed.describe()["cuda_graphs"].values()) == {"replayed"}


def test_two_threads(small: TensorRTBackend) -> None:
    failures: list[BaseException] = []

    def work(backend: TensorRTBackend, seed: int) -> None:
        try:
            with backend:
                for turn in range(30):
                    assert_close(backend, stress(1 + turn % 4, seed + turn)["mixed lengths"])
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(small.fork(), seed)) for seed in (0, 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_threads_that_load_record_and_free_at_the_same_time(small: TensorRTBackend) -> None:
    """Capturing in one thread forbids others to allocate, free or load: 4 threads of 50 new contexts each."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for turn in range(50):
                with small.fork() as backend:
                    assert_close(backend, stress(1 + (seed + turn) % MAX_BATCH, seed)["mixed lengths"])
                    assert set(backend.describe()["cuda_graphs"].values()) == {"replayed"}
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_load_and_free_again_without_leaking(built: EngineInfo) -> None:
    model_file = model_file_of(built)

    def cycle() -> int:
        with TensorRTBackend.open(built.path, model_file, ATTENTION_SPEC) as backend:
            backend.infer(*stress(3)["full"])
        return cuda.memory_info()[0]

    for _ in range(3):  # the library's own pools settle
        cycle()
    before = cycle()
    after = [cycle() for _ in range(10)][-1]
    # one forgotten context, buffer or engine of this network is above 1 MiB each time
    assert before - after < 8 << 20


def test_engine_times_are_positive_and_graphs_do_not_change_them_much(small: TensorRTBackend) -> None:
    times = small.engine_milliseconds(1, repeats=20)
    assert times.shape == (20,)
    assert (times > 0).all()
    layers = small.layer_milliseconds(1, repeats=5)
    assert layers
    assert all(value >= 0 for value in layers.values())


def test_an_engine_of_another_gpu_or_version(built: EngineInfo) -> None:
    model_file = model_file_of(built)
    for changes in ({"library_version": "8.5.1"}, {"compute_capabilities": ("5.0",), "gpu_name": "Other GPU"}):
        with pytest.raises(EngineMismatch, match="ccnet rebuild"):
            TensorRTBackend.open(built.path, dataclasses.replace(model_file, **changes), ATTENTION_SPEC)


@pytest.mark.parametrize("damage", ["short", "header"])
def test_a_damaged_plan(built: EngineInfo, tmp_path: Path, damage: str) -> None:
    """Damaged kernels the library would not notice: against those a bundle is verified by hash before this."""
    content = bytearray(built.path.read_bytes())
    if damage == "short":
        content = content[: len(content) // 2]
    else:
        content[4:64] = bytes(60)
    path = tmp_path / "damaged.engine"
    path.write_bytes(content)
    model_file = dataclasses.replace(model_file_of(built), build={})
    with pytest.raises((EngineError, BundleError, EngineMismatch)):
        TensorRTBackend.open(path, model_file, ATTENTION_SPEC)


@pytest.mark.parametrize("precision", list(TOLERANCE))
def test_the_real_network_against_its_recorded_reference(
    format: str, precision: str, device: cuda.Device, tmp_path: Path
) -> None:
    folder, recorded = os.environ.get("CCNET_GPU_BUNDLE"), os.environ.get("CCNET_GPU_REFERENCE")
    if not folder or not recorded:
        pytest.skip("CCNET_GPU_BUNDLE and CCNET_GPU_REFERENCE name no bundle and reference")
    bundle = read_bundle(folder)
    graph = "fp32" if precision == "tf32" else precision
    wanted = [a for a in bundle.manifest.model_files if a.format == "onnx" and a.precision == graph]
    if not wanted:
        pytest.skip(f"the bundle has no {graph} graph")
    info = build_for_this_gpu(bundle.path(wanted[0]), tmp_path / "real.engine", format, precision)
    spec = bundle.spec
    try:
        report = check_engine_file(info.path, model_file_of(info), spec, Path(recorded))
    except EngineMismatch as error:
        pytest.skip(str(error))
    assert report["passed"], report
