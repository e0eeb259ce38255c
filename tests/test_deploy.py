"""The fused network: the same function as the eager network, over switches, lengths, batches, types and opsets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import SWITCHES, TINY, random_batch, random_network, shared_path
from torch import Tensor

from ccnet.config import Config, ModelConfig
from ccnet.network.model import CCNet
from ccnet.network.released import load_released
from export.fused.layout import Layout
from export.fused.network import FusedNetwork, fused_network
from runtime.errors import ExportError
from runtime.spec import point_grid

LENGTHS = [32, 31, 17, 16, 15, 9, 8, 7, 2, 1]
"""Full, around every stride of the pyramid, and single steps."""


def valid_points(mask: Tensor, levels: int) -> Tensor:
    grid = point_grid(mask.shape[2], levels)
    return torch.from_numpy(grid.valid_points(mask[:, 0].numpy()))


def largest_difference(
    eager: CCNet, deployed: FusedNetwork, batch: tuple[Tensor, Tensor, Tensor], *, videos: list[int] | None = None
) -> float:
    """Largest absolute difference of logits and offsets at valid points; the deployed network may be shorter."""
    visual, audio, mask = (part if videos is None else part[videos] for part in batch)
    steps = deployed.config.length
    with torch.inference_mode():
        expected = eager(visual, audio, mask)
        got = deployed(visual[..., :steps], audio[..., :steps], mask[..., :steps])
    valid = valid_points(mask, eager.config.levels)
    valid_short = valid_points(mask[..., :steps], eager.config.levels)
    pairs = zip(expected, got, strict=True)
    return max(float((one[valid] - other[valid_short]).abs().max()) for one, other in pairs)


@pytest.mark.parametrize("switch", SWITCHES)
def test_equals_the_eager_network(switch: str) -> None:
    config = dataclasses.replace(TINY, **SWITCHES[switch])
    eager = random_network(config)
    # Measured: 1.3e-6 with values around 1.
    assert largest_difference(eager, fused_network(eager), random_batch(config, LENGTHS)) < 5e-6


@pytest.mark.parametrize("length", [8, 16, 24])
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_shorter_network_is_exact_for_every_video_that_fits(switch: str, length: int) -> None:
    config = dataclasses.replace(TINY, **SWITCHES[switch])
    eager = random_network(config)
    fitting = [i for i, n in enumerate(LENGTHS) if n <= length]
    deployed = fused_network(eager, length=length)
    assert deployed.config.length == length
    assert largest_difference(eager, deployed, random_batch(config, LENGTHS), videos=fitting) < 5e-6


def test_the_comparison_would_see_a_missing_halo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting without a point that stands for the rest is wrong by far more than rounding."""
    eager = random_network(TINY)
    batch = random_batch(TINY, [16])
    monkeypatch.setattr(Layout, "cut", property(lambda self: False))
    careless = fused_network(eager, length=16)
    assert largest_difference(eager, careless, batch) > 1e-3


def test_golden_weights_with_values_of_hundreds() -> None:
    with np.load(shared_path("reference/authors_tiny.npz"), allow_pickle=False) as golden:
        parameters = {k[6:]: torch.from_numpy(golden[k]) for k in golden.files if k.startswith("param/")}
        visual, audio = torch.from_numpy(golden["visual"]), torch.from_numpy(golden["audio"])
        mask = torch.arange(64) < torch.from_numpy(golden["lengths"])[:, None, None]
        valid, logits = torch.from_numpy(golden["point_mask"]), torch.from_numpy(golden["cls_logits"])
    eager = CCNet(ModelConfig(length=64, visual_dim=48, audio_dim=16, dim=32, num_classes=7, head_dim=24)).eval()
    load_released(eager, parameters)
    # Measured: float32 4e-6; float16 0.010; bfloat16 0.069.
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 0.03), (torch.bfloat16, 0.25)):
        with torch.inference_mode():
            got, _ = fused_network(eager, dtype=dtype)(visual, audio, mask)
        assert (got - logits)[valid].abs().max() < tolerance


@pytest.mark.parametrize("switch", ["all", "no_tcg", "no_self_attention", "f2c_first"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.2)])
def test_half_types_stay_near_and_finite(switch: str, dtype: torch.dtype, tolerance: float) -> None:
    config = dataclasses.replace(TINY, **SWITCHES[switch])
    eager = random_network(config)
    visual, audio, mask = random_batch(config, LENGTHS)
    for deployed in (fused_network(eager, dtype=dtype), fused_network(eager, dtype=dtype, length=16)):
        steps = deployed.config.length
        fitting = [i for i, n in enumerate(LENGTHS) if n <= steps]
        # Measured over the switches: float16 0.004, bfloat16 0.041.
        assert largest_difference(eager, deployed, (visual, audio, mask), videos=fitting) < tolerance
        for factor in (0.0, 1e6):
            outputs = deployed(factor * visual[..., :steps], factor * audio[..., :steps], mask[..., :steps])
            assert all(out.dtype == torch.float32 and out.isfinite().all() for out in outputs)


def test_no_valid_step_at_all_gives_finite_numbers() -> None:
    eager = random_network(TINY)
    for dtype in (torch.float32, torch.float16):
        outputs = fused_network(eager, dtype=dtype)(*random_batch(TINY, [0, 3]))
        assert all(out.isfinite().all() for out in outputs)


def test_a_video_gets_the_same_alone_and_in_a_batch() -> None:
    deployed = fused_network(random_network(TINY))
    visual, audio, mask = random_batch(TINY, [32, 17, 1])
    with torch.inference_mode():
        together = deployed(visual, audio, mask)
        for i in range(3):
            alone = deployed(visual[i : i + 1], audio[i : i + 1], mask[i : i + 1])
            for ours, expected in zip(together, alone, strict=True):
                torch.testing.assert_close(ours[i : i + 1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [0, 12, 40])
def test_a_length_that_cannot_be_is_refused(length: int) -> None:
    with pytest.raises(ExportError, match=rf"length: got {length}, expected a multiple of 8 from 8 to 32"):
        fused_network(CCNet(TINY), length=length)


def test_a_type_that_cannot_be_is_refused() -> None:
    with pytest.raises(ExportError, match=r"dtype: got torch\.int8"):
        fused_network(CCNet(TINY), dtype=torch.int8)


def test_layout_of_the_published_network() -> None:
    layout = Layout((224, 112, 56, 28, 14, 7), (224, 112, 56, 28, 14, 7))
    assert layout.lengths == [224, 112, 56, 32, 16, 8]
    assert layout.is_step().sum() == 441
    cut = Layout((96, 48, 24, 12, 6, 3), layout.trained)
    assert cut.lengths == [104, 56, 32, 16, 8, 8]
    taps = layout.part(5).taps()  # 7 steps and a point for alignment, which no step reads
    assert taps[:, 6].tolist() == [5, 6, 8]
    assert cut.part(5).taps()[:, 2].tolist() == [1, 2, 3]  # the halo is read


SIX_LEVELS = ModelConfig(length=32, visual_dim=12, audio_dim=6, dim=16, num_classes=3, head_dim=8, tdm_dim=8)


@pytest.mark.slow
@pytest.mark.parametrize(("opset", "batch", "length"), [(20, None, 32), (17, None, 32), (20, 1, 32)])
def test_exports_to_onnx_within_the_node_budget(tmp_path: Path, opset: int, batch: int | None, length: int) -> None:
    """The number of nodes depends on switches and levels, not on widths: that of the full-size network is the same."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from export.graph.to_onnx import export_onnx

    eager = random_network(SIX_LEVELS)
    spec = Config(model=SIX_LEVELS).spec(("a", "b", "c"))
    path = tmp_path / "model.onnx"
    info = export_onnx(fused_network(eager, length=length), spec, path, opset=opset, batch=batch)
    # Measured: 996; below opset 20 each of the 19 Gelu is five nodes.
    assert info.nodes <= (1000 if opset >= 20 else 1080)
    assert "Slice" not in info.operators
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for size in (1, 3) if batch is None else (batch,):
        visual, audio, mask = random_batch(SIX_LEVELS, [20, 32, 1][:size])
        feeds = {"visual": visual.numpy(), "audio": audio.numpy(), "mask": mask.numpy()}
        got = session.run(None, feeds)
        with torch.inference_mode():
            expected = eager(visual, audio, mask)
        valid = valid_points(mask, SIX_LEVELS.levels).numpy()
        for one, other in zip(expected, got, strict=True):
            assert np.abs(one.numpy() - other)[valid].max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("max_batch", [1, 2])
def test_a_small_largest_batch_leaves_the_batch_axis_free(tmp_path: Path, max_batch: int) -> None:
    """The exporter took an axis of up to 2 for three different ones, as its example has 2 videos."""
    pytest.importorskip("onnx")
    from export.graph.to_onnx import export_onnx

    spec = Config(model=SIX_LEVELS).spec(("a", "b", "c"))
    export_onnx(fused_network(random_network(SIX_LEVELS)), spec, tmp_path / "model.onnx", max_batch=max_batch)
