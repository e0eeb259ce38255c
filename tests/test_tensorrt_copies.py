"""How batches get to the GPU: page-locked memory for callers, one copy for each direction, nothing reads it too late.

The simulated stream makes its copies when it is waited for: a buffer that is used again too early gives wrong output.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorrt_simulation import ENGINE_FILE, ENGINE_SPEC, Simulation, assert_right, inputs, write_engine

from runtime import Localizer
from runtime.backends.tensorrt import context
from runtime.backends.tensorrt.backend import TensorRTBackend
from runtime.backends.tensorrt.context import RunOptions
from runtime.backends.tensorrt.pinned import PinnedPool, block_of
from runtime.batches import Batch
from runtime.blocks import ALIGNMENT, BlockLayout
from runtime.errors import BundleError, EngineError
from runtime.features import FeatureFiles, VideoFeatures
from runtime.spec import INPUT_TYPES

MODES: tuple[Any, ...] = ("stream", "graph", "steps")
STEP_BYTES = 4 * (ENGINE_SPEC.visual_dim + ENGINE_SPEC.audio_dim)


def open_engine(path: Path, copies: Any, *, cuda_graph: bool = True) -> TensorRTBackend:
    running = RunOptions(copies=copies, cuda_graph=cuda_graph)
    return TensorRTBackend.open(path, ENGINE_FILE, ENGINE_SPEC, running=running)


def video(steps: int, seed: int) -> VideoFeatures:
    draw = np.random.default_rng(seed)
    widths = (ENGINE_SPEC.visual_dim, ENGINE_SPEC.audio_dim)
    visual, audio = (draw.standard_normal((steps, width), dtype=np.float32) for width in widths)
    return VideoFeatures(visual, audio)


def filled(batch: Batch, lengths: list[int], seed: int = 0) -> tuple[Any, Any, Any]:
    """Fill a batch and return its inputs."""
    batch.clear()
    for row, steps in enumerate(lengths):
        batch.add(video(steps, seed + row), 0, steps, "v")
    return batch.inputs()


def check_infer(backend: TensorRTBackend, arrays: tuple[Any, Any, Any]) -> None:
    """Assert that the outputs are those of the inputs as they are now, then write over these."""
    before = tuple(array.copy() for array in arrays)
    outputs = backend.infer(*arrays)
    for array in arrays:
        array[:] = -1
    assert_right(outputs, before)


def test_arrays_of_a_block() -> None:
    layout = BlockLayout.of(ENGINE_SPEC.input_shapes(3), INPUT_TYPES)
    block = np.zeros(layout.nbytes, np.uint8)
    arrays = layout.arrays(block)
    for value, (name, array) in enumerate(arrays.items(), 1):
        assert array.shape == ENGINE_SPEC.input_shapes(3)[name]
        assert array.dtype == INPUT_TYPES[name]
        assert (array.ctypes.data - block.ctypes.data) % ALIGNMENT == 0
        assert layout.row_bytes(name) == array[0].nbytes
        array[:] = value
    assert [float(array.max()) for array in arrays.values()] == [1, 2, 3]
    assert [float(array.min()) for array in arrays.values()] == [1, 2, 3]


@pytest.mark.parametrize("copies", MODES)
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_a_batch_is_copied_from_where_it_was_filled(
    sim: Simulation, engine_path: Path, copies: Any, cuda_graph: bool
) -> None:
    with open_engine(engine_path, copies, cuda_graph=cuda_graph) as backend:
        batch = Batch(ENGINE_SPEC, 4, backend.allocate)
        for seed, rows in enumerate((4, 4, 1, 3, 2, 4)):
            arrays = filled(batch, [16, 3, 9, 1][:rows], seed)
            assert all(block_of(array) is not None for array in arrays)
            check_infer(backend, arrays)
        assert backend.describe()["copies"] == copies
        assert len(sim.pinned) == 1  # the outputs; the warm-up's copy of its inputs went with its smaller batch
    del batch, arrays
    assert sim.held == {}


@pytest.mark.parametrize("copies", ["stream", "graph"])
def test_a_full_batch_is_one_copy_for_each_direction(sim: Simulation, engine_path: Path, copies: Any) -> None:
    with open_engine(engine_path, copies) as backend:
        batch = Batch(ENGINE_SPEC, 4, backend.allocate)
        check_infer(backend, filled(batch, [16, 3, 9, 1]))
        check_infer(backend, filled(batch, [16, 3, 9, 1], 1))
        sim.copies.clear()
        sim.launches = 0
        check_infer(backend, filled(batch, [2, 2, 2, 2], 2))
        layouts = (
            BlockLayout.of(ENGINE_SPEC.input_shapes(4), INPUT_TYPES),
            BlockLayout.of(ENGINE_SPEC.output_shapes(4), {"logits": np.float32, "offsets": np.float32}),
        )
        assert sim.copies == [("in", layouts[0].nbytes), ("out", layouts[1].nbytes)]
        assert sim.launches == 1
        sim.copies.clear()
        check_infer(backend, filled(batch, [2, 2, 2], 3))
        rows = 3 * (16 * STEP_BYTES + 4)
        assert sum(n for direction, n in sim.copies if direction == "in") == rows  # and not those of the fourth row


def test_valid_steps_alone_are_copied(sim: Simulation, engine_path: Path) -> None:
    with open_engine(engine_path, "steps") as backend:
        batch = Batch(ENGINE_SPEC, 4, backend.allocate)
        for rows in (4, 2):
            check_infer(backend, filled(batch, [1] * rows))
        for lengths in ([16, 3, 9, 1], [2, 16, 9, 5], [1, 1], [7, 1, 2], [16, 16, 16, 16]):
            arrays = filled(batch, lengths, sum(lengths))
            expected = tuple(array.copy() for array in arrays)
            for row, steps in enumerate(lengths):
                for array in arrays[:2]:
                    array[row, steps:] = np.nan
            sim.copies.clear()
            assert_right(backend.infer(*arrays), expected)
            copied = sum(n for direction, n in sim.copies if direction == "in")
            assert copied == sum(lengths) * STEP_BYTES + 4 * len(lengths)


@pytest.mark.parametrize("copies", MODES)
def test_rows_that_a_batch_is_rounded_up_by_are_valid(sim: Simulation, engine_path: Path, copies: Any) -> None:
    """The simulated engine refuses a row without a valid step, and memory that nobody wrote."""
    with open_engine(engine_path, copies) as backend:
        for batch in (Batch(ENGINE_SPEC, 4, backend.allocate), Batch(ENGINE_SPEC, 4)):
            check_infer(backend, filled(batch, [5, 16, 2]))
            assert 4 in backend.describe()["cuda_graphs"]


@pytest.mark.parametrize("copies", MODES)
def test_nothing_reads_the_rows_of_a_request_that_failed(sim: Simulation, engine_path: Path, copies: Any) -> None:
    with open_engine(engine_path, copies, cuda_graph=False) as backend:
        batch = Batch(ENGINE_SPEC, 2, backend.allocate)
        sim.refuse_runs = True
        with pytest.raises(EngineError, match="refused to run"):
            backend.infer(*filled(batch, [16, 16]))
        assert not any(sim.streams.values())  # its copy is not under way any more: the rows may be filled again
        sim.refuse_runs = False
        check_infer(backend, filled(batch, [3, 1], 5))


@pytest.mark.parametrize("copies", MODES)
def test_a_copy_that_fails_leaves_no_stale_rows(sim: Simulation, engine_path: Path, copies: Any) -> None:
    with open_engine(engine_path, copies) as backend:
        batch = Batch(ENGINE_SPEC, 2, backend.allocate)
        check_infer(backend, filled(batch, [16, 16]))
        for call in ("cudaMemsetAsync", "cudaMemcpyAsync"):
            sim.faults[call] = 700
            arrays = filled(batch, [2, 9], 1)
            if copies == "steps" or (call, copies) == ("cudaMemcpyAsync", "stream"):
                with pytest.raises(EngineError, match=call):
                    backend.infer(*arrays)
            sim.faults.clear()
            check_infer(backend, filled(batch, [1, 4], 2))


def test_memory_is_as_good_as_any_once_its_engine_is_closed(sim: Simulation, engine_path: Path, tmp_path: Path) -> None:
    backend = open_engine(engine_path, "graph")
    batch = Batch(ENGINE_SPEC, 4, backend.allocate)
    arrays = filled(batch, [4, 4, 4, 4])
    backend.infer(*arrays)
    backend.close()
    assert sim.held == {}
    with pytest.raises(EngineError, match="closed"):
        backend.allocate((3,), np.float32)
    with open_engine(write_engine(tmp_path / "other" / "e.engine"), "graph") as other:
        assert block_of(arrays[0]) is None
        check_infer(other, filled(batch, [1, 2, 3, 4]))


def test_an_engine_copies_from_the_memory_of_another_one(sim: Simulation, engine_path: Path, tmp_path: Path) -> None:
    path = write_engine(tmp_path / "other" / "e.engine")
    with open_engine(engine_path, "stream") as first, open_engine(path, "stream") as second:
        arrays = filled(Batch(ENGINE_SPEC, 2, first.allocate), [4, 4])
        check_infer(second, arrays)
        assert sim.copies[-2][0] == "in"
        assert first.describe()["pinned_bytes"] > 0
        assert second.describe()["pinned_bytes"] == 0


def test_blocks_are_used_again_and_bounded(sim: Simulation, caplog: pytest.LogCaptureFixture) -> None:
    pool = PinnedPool(0, largest=3 * 4096)
    first, second = pool.allocate((4096,), np.uint8), pool.allocate((2, 1000), np.float32)
    assert list(sim.registered.values()) == [4096, 8192]
    rows = first[10:20].view(np.uint16)
    address = first.ctypes.data
    del first
    assert block_of(pool.allocate((5,), np.uint8)) is None  # a view of the first one lives
    del rows
    again = pool.allocate((5,), np.uint8)
    assert again.ctypes.data == address
    assert len(sim.registered) == 2
    del again, second
    kept = [pool.allocate((4096,), np.uint8) for _ in range(4)]
    assert [block_of(array) is not None for array in kept] == [True, True, False, False]
    assert "more than 12288 bytes" in pool.refusal
    kept[3][:] = 1
    kept.append(pool.allocate((4096,), np.uint8))
    assert len(caplog.records) == 2  # and not for every batch
    pool.close()
    assert sim.held == {}
    kept[0][:] = 1

    pool = PinnedPool(0, largest=4 * 4096)
    pool.allocate((8192,), np.uint8)
    again = pool.allocate((3 * 4096,), np.uint8)  # the first one, which nobody uses, made room
    assert list(sim.registered.values()) == [3 * 4096]
    del again
    assert block_of(pool.allocate((1,), np.uint8)) is not None
    assert list(sim.registered.values()) == [4096]  # and too much was idle
    pool.close()


def test_pages_that_can_not_be_locked(sim: Simulation, engine_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_engine(engine_path, "graph") as backend:
        sim.faults["cudaHostRegister"] = 801
        batch = Batch(ENGINE_SPEC, 4, backend.allocate)
        check_infer(backend, filled(batch, [4, 8, 4, 1]))
        assert "copied once more" in caplog.text
        assert "cudaHostRegister failed" in backend.describe()["pinned_refusal"]
    assert sim.held == {}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_process_does_not_share_the_pages(sim: Simulation) -> None:
    """Or a page that the parent writes next is a copy, and the GPU reads the old one."""
    pool = PinnedPool(0)
    array = pool.allocate((3 * 4096,), np.uint8)
    _, found, entry = Path("/proc/self/smaps").read_text().partition(f"{array.ctypes.data:x}-")
    if not found:
        pytest.skip("the pages were merged with a neighbouring mapping")
    assert " dc" in entry[entry.index("VmFlags") :].splitlines()[0]
    pool.close()


def test_graphs_with_copies_are_bounded(sim: Simulation, engine_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "MOST_PLACES", 3)
    with open_engine(engine_path, "graph") as backend:
        batches = [Batch(ENGINE_SPEC, 2, backend.allocate) for _ in range(4)]
        for seed, batch in enumerate(itertools.chain(batches, batches)):
            check_infer(backend, filled(batch, [5, 3], seed))
        # for batch 2 and 1 the engine alone; for 2 three places, for 1 that of the warm-up
        assert len(sim.graphs) == 2 + 3 + 1
    assert sim.held == {}


def test_copies_that_can_not_be_captured_are_made_outside(sim: Simulation, engine_path: Path) -> None:
    with open_engine(engine_path, "graph") as backend:
        batch = Batch(ENGINE_SPEC, 2, backend.allocate)
        sim.faults["cudaGraphInstantiate"] = 900
        with pytest.warns(UserWarning, match="copied outside its CUDA graph, slower: cudaGraphInstantiate"):
            check_infer(backend, filled(batch, [5, 3]))
        check_infer(backend, filled(batch, [1, 3], 1))  # said once
    assert sim.held == {}


def test_a_graph_with_copies_that_replays_wrongly_is_an_error(sim: Simulation, engine_path: Path) -> None:
    with open_engine(engine_path, "graph") as backend:
        batch = Batch(ENGINE_SPEC, 2, backend.allocate)
        sim.capture_nothing = True
        with pytest.raises(EngineError, match="replayed CUDA graph gives another"):
            backend.infer(*filled(batch, [5, 3]))
    assert sim.held == {}


def test_how_to_run_an_engine_comes_from_the_manifest(sim: Simulation, engine_path: Path) -> None:
    model_file = dataclasses.replace(ENGINE_FILE, options={"copies": "steps", "high_priority": True})
    with TensorRTBackend.open(engine_path, model_file, ENGINE_SPEC) as backend, backend.fork() as fork:
        fork.infer(*inputs(1))
        assert fork.describe()["copies"] == backend.describe()["copies"] == "steps"
        assert sim.priorities == [-5, -5]
    wrong = dataclasses.replace(ENGINE_FILE, options={"copies": "twice"})
    with pytest.raises(BundleError, match="copies: got 'twice', expected one of stream, graph, steps"):
        TensorRTBackend.open(engine_path, wrong, ENGINE_SPEC)


@pytest.mark.parametrize("copies", MODES)
def test_a_stream_of_files_overlaps_and_leaves_nothing(
    sim: Simulation, engine_path: Path, tmp_path: Path, copies: Any
) -> None:
    lengths = [1 + 7 * i % 16 for i in range(30)]
    for i, steps in enumerate(lengths):
        features = video(steps, i)
        np.save(tmp_path / f"v{i}_rgb.npy", features.visual[:, :4])
        np.save(tmp_path / f"v{i}_flow.npy", features.visual[:, 4:])
        np.save(tmp_path / f"v{i}_vggish.npy", features.audio)

    with Localizer([open_engine(engine_path, copies)], ENGINE_SPEC) as localizer:
        expected = [localizer.batch([video(steps, i)])[0] for i, steps in enumerate(lengths)]
        before = len(sim.registered)
        items = ((f"v{i}", FeatureFiles(tmp_path, f"v{i}")) for i in range(len(lengths)))
        results = list(localizer.stream(items, batch_size=4, workers=3))
        assert len(sim.registered) <= before + 3 + 2  # one for each thread
        for result, want in zip(results, expected, strict=True):
            assert result.detections is not None
            np.testing.assert_array_equal(result.detections.scores, want.scores)
            np.testing.assert_array_equal(result.detections.segments, want.segments)
        assert localizer.describe()["engines"][0]["pinned_refusal"] is None
    assert sim.held == {}
