"""The real network, exported and run by the torch-free runtime: same events as eager PyTorch, whatever the length."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from builders import Exported, engine

from runtime.backends.select import open_engine
from runtime.bundle import ModelFile
from runtime.localizer import Localizer
from runtime.profiling.workload import sample_videos

pytestmark = pytest.mark.slow  # exporting takes about half a minute

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def bundle(six_levels: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bundle of the six-level network."""
    from export.bundle_writer import new_bundle

    folder = tmp_path_factory.mktemp("end_to_end") / "bundle"
    model = six_levels.network.config.to_json()
    with new_bundle(folder, spec=six_levels.spec, model=model, checkpoint_sha256="0" * 64, versions={}) as draft:
        shutil.copy(six_levels.path, draft.folder / "model.onnx")
        draft.add_model_file(
            ModelFile(name="onnx-fp32", format="onnx", files=("model.onnx",), precision="fp32", max_batch=4)
        )
        for backend in ("onnxruntime", "openvino"):
            draft.set_engine(engine(backend, model_file="onnx-fp32"))
    return folder


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_runtime_finds_the_events_of_eager_pytorch(six_levels: Exported, bundle: Path, backend: str) -> None:
    from ccnet.torch_backend import TorchBackend

    pytest.importorskip(backend)
    spec = six_levels.spec
    videos = [sample_videos(spec, 1, steps=steps, seed=steps)[0] for steps in (1, 17, 63, 64, 90)]
    with (
        Localizer([TorchBackend(six_levels.network, spec)], spec, long_videos="windows") as eager,
        Localizer.load(bundle, backend, long_videos="windows") as deployed,
    ):
        expected, found = eager.batch(videos), deployed.batch(videos)
    for want, got in zip(expected, found, strict=True):
        assert len(want) == len(got) > 0
        # Float32 in another order of additions: 1e-6 relative per operation, through some hundred of them. Scores that
        # nearly tie may trade places, so they are compared as a sorted list.
        np.testing.assert_allclose(got.scores, want.scores, atol=2e-4)
        confident = want.scores > want.scores[-1] + 1e-3
        for segment, label in zip(want.segments[confident], want.labels[confident], strict=True):
            same = got.labels == label
            assert np.abs(got.segments[same] - segment).max(axis=1).min() < 1e-2


def test_a_video_does_not_depend_on_its_batch(six_levels: Exported, bundle: Path) -> None:
    spec = six_levels.spec
    videos = [sample_videos(spec, 1, steps=steps, seed=steps)[0] for steps in (5, 64, 33)]
    with Localizer.load(bundle, "onnxruntime") as localizer:
        together = localizer.batch(videos)
        for video, found in zip(videos, together, strict=True):
            alone = localizer(video.visual, video.audio)
            # Other batch sizes may take other kernels: rounding, nothing more.
            np.testing.assert_allclose(found.scores, alone.scores, atol=1e-5)


def test_the_manifest_decides_precision_and_largest_batch(bundle: Path) -> None:
    from runtime.bundle import read_bundle

    with open_engine(read_bundle(bundle), "onnxruntime").backend as backend:
        assert backend.precision == "fp32"
        assert backend.max_batch == 4
