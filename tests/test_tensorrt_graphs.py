"""TensorRT engines of an extractor's graphs: run on a simulated GPU, built by TensorRT for RTX without one."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import edit_manifest
from tensorrt_simulation import ENGINE_FILE, Simulation, expected_outputs, write_engine

from ccnet.cli.main import main
from runtime.backends.graphs import GraphRunner
from runtime.backends.tensorrt.backend import open_graph
from runtime.backends.tensorrt.graph import MOST_SHAPES
from runtime.errors import BundleError, ConfigError, EngineError, ExportError
from runtime.spec import GraphTensors
from runtime.video.extractor import Extractor, graph_of, read_extractor

TENSORS = GraphTensors({"first": ("batch", 6, "columns"), "second": ("batch", 4)}, {"levels": ("batch", 3, 2)})
FILE = dataclasses.replace(ENGINE_FILE, options={"extents": {"columns": [1, 8, 64]}})


def draw(rows: int, columns: int = 8) -> dict[str, np.ndarray]:
    random = np.random.default_rng(rows)
    shapes = {"first": (rows, 6, columns), "second": (rows, 4)}
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


@pytest.fixture
def runner(sim: Simulation, tmp_path: Path) -> GraphRunner:
    engine = write_engine(tmp_path / "e.engine", tensors=TENSORS)
    return open_graph("tensorrt", engine, FILE, TENSORS, "fp16", None)


def test_rows_of_any_number_and_pictures_of_any_size(runner: GraphRunner, sim: Simulation) -> None:
    for rows, columns in ((3, 8), (4, 8), (5, 8), (3, 8), (2, 20)):
        inputs = draw(rows, columns)
        (levels,) = runner.run(*inputs.values())
        expected = expected_outputs(inputs, {"levels": (rows, 3, 2)})["levels"]
        assert levels.dtype == np.float32
        assert np.array_equal(levels, expected)
    facts = runner.describe()
    assert facts["cuda_graphs"] == dict.fromkeys(("4x6x8 4x4", "1x6x8 1x4", "2x6x20 2x4"), "replayed")
    assert (facts["backend"], facts["precision"]) == ("tensorrt", "fp16")
    assert sim.launches == 6 - 3 + 3  # each shape's first run is plain, and its replay compared
    runner.close()
    runner.close()
    assert sim.held == {}


def test_shapes_that_stay_prepared_are_limited(runner: GraphRunner, sim: Simulation) -> None:
    for columns in range(1, MOST_SHAPES + 4):
        runner.run(*draw(1, columns).values())
    assert sim.contexts == MOST_SHAPES
    runner.close()
    assert sim.held == {}


def test_what_goes_wrong_is_said_and_holds_nothing(runner: GraphRunner, sim: Simulation) -> None:
    sim.refuse_inputs = True
    with pytest.raises(EngineError, match=r"built for batch 1 to 4, columns 1 to 64 .*--backend onnxruntime-cuda"):
        runner.run(*draw(1, 99).values())
    sim.refuse_inputs, sim.refuse_runs = False, True
    with pytest.raises(EngineError, match=r"refused to run:\n  simulated refusal"):
        runner.run(*draw(1).values())
    sim.refuse_runs, sim.capture_nothing = False, True
    with pytest.raises(EngineError, match="replayed CUDA graph gives another 'levels'"):
        runner.run(*draw(1).values())
    sim.capture_nothing = False
    assert np.isfinite(runner.run(*draw(1).values())[0]).all()
    runner.close()
    assert sim.held == {}


def test_a_graph_that_cannot_be_captured_runs_without(runner: GraphRunner, sim: Simulation) -> None:
    sim.faults["cudaGraphInstantiate"] = 900
    with pytest.warns(UserWarning, match="runs without a CUDA graph, slower"):
        (levels,) = runner.run(*draw(2).values())
    assert np.array_equal(levels, expected_outputs(draw(2), {"levels": (2, 3, 2)})["levels"])


def test_an_engine_of_other_tensors_is_refused(sim: Simulation, tmp_path: Path) -> None:
    engine = write_engine(tmp_path / "e.engine")
    with pytest.raises(BundleError, match=r"its inputs are .*'visual'.*, expected \['first', 'second'\]"):
        open_graph("tensorrt", engine, FILE, TENSORS, "fp16", None)
    assert sim.held == {}


def test_an_engine_is_built_for_pictures_of_a_range_of_sizes(extractor: Extractor, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'ccnet[rtx]')")
    from export.tensorrt.build import build_engine
    from export.tensorrt.options import EngineOptions

    options = EngineOptions(format="tensorrt-rtx", profile=(1, 2, 2), compute_capabilities=("8.9",))
    graph, engine = extractor.folder / "encode.onnx", tmp_path / "encode.engine"
    with pytest.raises(
        ExportError, match=r"only the first and those named \(none\) may be dynamic, got '8\*rows' at 2"
    ):
        build_engine(graph, engine, options)
    with pytest.raises(ExportError, match="extents: got .* expected 1 <= min <= opt <= max"):
        dataclasses.replace(options, extents={"rows": (16, 8, 40)})
    extents: dict[str, tuple[int, ...]] = {"rows": (16, 16, 40), "columns": (16, 29, 40)}
    info = build_engine(graph, engine, dataclasses.replace(options, extents=extents))
    assert info.model_file(name="encode-tensorrt-rtx-fp32").options["extents"] == {
        n: list(e) for n, e in extents.items()
    }


def test_a_graph_is_written_in_every_format_and_precision_and_built_again(
    extractor: Extractor, extractor_networks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed (pip install 'ccnet[rtx]')")
    from export.bundle_writer import new_folder
    from export.engines import EngineRequest
    from export.extractors.bundle import add_graph
    from export.tensorrt.options import EngineOptions

    request = EngineRequest(
        formats=("onnx", "tensorrt-rtx"),
        precisions=("fp32", "fp16"),
        engine=EngineOptions(compute_capabilities=("8.9",)),
    )
    empty = dataclasses.replace(extractor.manifest, files=(), model_files=(), engines=())
    folder, skipped = tmp_path / "vggish", dict[str, str]()
    with new_folder(folder, empty) as draft:
        add_graph(draft, "vggish", extractor_networks, request, skipped)
    written = read_extractor(folder)
    written.verify()
    assert [file.name for file in written.manifest.model_files] == [
        *("vggish-onnx-fp32", "vggish-onnx-fp16", "vggish-tensorrt-rtx-fp16", "vggish-tensorrt-rtx-fp32"),
    ]
    engines = {engine.name: engine for engine in written.engines("vggish")}
    half = written.model_file("vggish-tensorrt-rtx-fp16")
    assert engines["vggish-tensorrt-rtx-fp16"].status == "unverified"
    assert engines["vggish-onnxruntime-fp16"].model_file == "vggish-onnx-fp16"
    assert (half.profile, half.build["delivered_precisions"].get("fp16", 0) > 0) == ((1, 8, 8), True)

    assert main(["rebuild", str(folder), "vggish-tensorrt-rtx-fp32"]) == 2  # `current` needs a GPU
    assert "no CUDA here" in capsys.readouterr().err
    assert main(["inspect", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"extractor .*vggish.*\n.*\nweights     i3d_rgb [0-9a-f]{16}\n", shown)
    assert "flow of 1 iterations" in shown


def test_an_extractor_is_verified_without_weights_or_torch(
    extractor: Extractor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(extractor.folder, copy)
    engines = tuple(
        dataclasses.replace(engine, status="unverified" if engine.backend == "onnxruntime" else "verified")
        for engine in extractor.manifest.engines
    )
    edit_manifest(copy, engines=engines, read=read_extractor)
    assert main(["verify", str(copy)]) == 0
    assert "verified: encode-onnxruntime-fp32, flow-onnxruntime-fp32" in capsys.readouterr().out
    assert {engine.status for engine in read_extractor(copy).manifest.engines} == {"verified"}
    assert main(["verify", str(copy)]) == 0
    assert "every engine is verified already" in capsys.readouterr().out
    assert main(["verify", str(copy), "--checkpoint", "c"]) == 2
    assert "an extractor brings what its engines are compared with" in capsys.readouterr().err
    with open(copy / "reference.npz", "ab") as stream:
        stream.write(b"more")
    assert main(["verify", str(copy), "--backend", "onnxruntime"]) == 2
    assert "reference.npz" in capsys.readouterr().err


def test_precisions_and_names_that_extractors_do_not_have(extractor_networks: Any, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from export.engines import EngineRequest
    from export.extractors.bundle import make_extractor

    with pytest.raises(ConfigError, match="precision: got 'int8', extractors have fp32, tf32, fp16, bf16, or auto"):
        make_extractor(extractor_networks, extractor_networks.spec(), {}, tmp_path, EngineRequest(precisions=("int8",)))
    with pytest.raises(BundleError, match="'onnxruntime-fp32' does not begin with a graph"):
        graph_of("onnxruntime-fp32")
