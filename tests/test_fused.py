"""The fused network: the same function as the eager network, over lengths, batches, types and opsets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import SWITCHES, TINY, Exported, engine_inputs, random_batch, random_network, shared_path
from torch import Tensor

from ccnet.config import Config, ModelConfig
from ccnet.network.model import CCNet
from ccnet.network.released import load_released
from export.fused.layout import Layout
from export.fused.network import FusedNetwork, fused_network
from runtime.errors import ExportError
from runtime.spec import INPUT_NAMES, point_grid

LENGTHS = [32, 31, 17, 16, 15, 9, 8, 7, 2, 1]
"""Full, around every stride of the pyramid, and single steps."""
STRUCTURES: dict[str, dict[str, Any]] = {
    "padded": {},  # 32, 16, 8, 4 steps: the coarsest level is padded to 8 points
    "unpadded": {"length": 64},
    "two_levels": {"levels": 2},
    "no_self_attention": {"self_layers": 0},
}
DAVEL = {"tcg": False, "c2f": False, "f2c": False, "tdm_channel_branch": False}
ABSENT: dict[str, dict[str, Any]] = {**{name: {name: False} for name in DAVEL}, "davel": DAVEL}
"""Parts that the fused network can do without: each, and all that DAVEL does not have."""
ABLATIONS = {name: SWITCHES[name] for name in ("no_cmi", "f2c_first", "one_level")}


def valid_points(mask: Tensor, levels: int) -> Tensor:
    return torch.from_numpy(point_grid(mask.shape[2], levels).valid_points(mask.sum((1, 2))))


def largest_difference(eager: CCNet, fused: FusedNetwork, batch: tuple[Tensor, Tensor, Tensor]) -> float:
    """Return the largest absolute difference of logits and offsets at valid points."""
    with torch.inference_mode():
        expected, got = eager(*batch), fused(*engine_inputs(*batch))
    valid = valid_points(batch[2], eager.config.levels)
    return max(float((one - other)[valid].abs().max()) for one, other in zip(expected, got, strict=True))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_equals_the_eager_network(structure: str) -> None:
    config = dataclasses.replace(TINY, **STRUCTURES[structure])
    eager = random_network(config)
    # Measured: 2.9e-6 with values around 1.
    assert largest_difference(eager, fused_network(eager), random_batch(config, [config.length, *LENGTHS])) < 1e-5


@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize("length", [32, 64])  # padded and unpadded
def test_parts_can_be_absent(absent: str, length: int) -> None:
    config = dataclasses.replace(TINY, length=length, **ABSENT[absent])
    eager = random_network(config)
    batch = random_batch(config, [length, *LENGTHS])
    # Measured: float32 1.5e-6, float16 0.006.
    assert largest_difference(eager, fused_network(eager), batch) < 1e-5
    assert largest_difference(eager, fused_network(eager, dtype=torch.float16), batch) < 0.02


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablated_networks_are_left_to_the_reference_graph(ablation: str) -> None:
    [switch] = ABLATIONS[ablation]
    with pytest.raises(ExportError, match=rf"model\.{switch} = .*--graph reference"):
        fused_network(random_network(dataclasses.replace(TINY, **ABLATIONS[ablation])))


def test_a_module_of_another_kind_is_not_dropped() -> None:
    eager = random_network(TINY)
    blocks = eager.get_submodule("mtgc.stages.f2c.blocks")
    blocks.add_module("1", torch.nn.Identity())
    with pytest.raises(TypeError, match="expected Block, got Identity"):
        fused_network(eager)


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
            got, _ = fused_network(eager, dtype=dtype)(*engine_inputs(visual, audio, mask))
        assert (got - logits)[valid].abs().max() < tolerance


@pytest.mark.parametrize("structure", ["padded", "unpadded", "no_self_attention"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.2)])
def test_half_types_stay_near_and_finite(structure: str, dtype: torch.dtype, tolerance: float) -> None:
    config = dataclasses.replace(TINY, **STRUCTURES[structure])
    eager = random_network(config)
    visual, audio, mask = random_batch(config, LENGTHS)
    fused = fused_network(eager, dtype=dtype)
    # Measured: float16 0.004, bfloat16 0.041.
    assert largest_difference(eager, fused, (visual, audio, mask)) < tolerance
    for factor in (0.0, 1e6):
        outputs = fused(*engine_inputs(factor * visual, factor * audio, mask))
        assert all(out.dtype == torch.float32 and out.isfinite().all() for out in outputs)


def test_no_valid_step_at_all_gives_finite_numbers() -> None:
    eager = random_network(TINY)
    for dtype in (torch.float32, torch.float16):
        outputs = fused_network(eager, dtype=dtype)(*engine_inputs(*random_batch(TINY, [0, 3])))
        assert all(out.isfinite().all() for out in outputs)


def test_a_video_gets_the_same_alone_and_in_a_batch() -> None:
    fused = fused_network(random_network(TINY))
    visual, audio, lengths = engine_inputs(*random_batch(TINY, [32, 17, 1]))
    with torch.inference_mode():
        together = fused(visual, audio, lengths)
        for i in range(3):
            alone = fused(visual[i : i + 1], audio[i : i + 1], lengths[i : i + 1])
            for ours, expected in zip(together, alone, strict=True):
                torch.testing.assert_close(ours[i : i + 1], expected, rtol=1e-5, atol=1e-5)


def test_a_type_that_cannot_be_is_refused() -> None:
    with pytest.raises(ExportError, match=r"dtype: got torch\.int8"):
        fused_network(CCNet(TINY), dtype=torch.int8)


def test_layout_of_the_published_network() -> None:
    layout = Layout((224, 112, 56, 28, 14, 7))
    assert layout.sizes == [224, 112, 56, 32, 16, 8]
    assert layout.is_step().sum() == 441
    taps = layout.part(5).taps()  # 7 steps and a padding point, which no step reads
    assert taps[:, 6].tolist() == [5, 6, 8]
    assert layout.strided_taps(3)[:, 13].tolist() == [25, 26, 27]
    assert layout.strided_taps(3)[:, 14].tolist() == [27, 32, 32]  # a padding point; 32 is the zero row


@pytest.mark.slow  # the export
def test_exports_to_onnx_within_the_node_budget(six_levels: Exported) -> None:
    """The number of nodes depends on levels and layers, not on widths: that of the full-size network is the same."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    operators = [node.op_type for node in onnx.load(six_levels.path).graph.node]
    assert len(operators) <= 995  # measured: 993
    assert "Slice" not in operators
    session = onnxruntime.InferenceSession(str(six_levels.path), providers=["CPUExecutionProvider"])
    for lengths in ([20], [40, 64, 1]):
        assert_same_outputs(six_levels.network, session, random_batch(six_levels.network.config, lengths))


@pytest.mark.slow  # an export
@pytest.mark.parametrize("absent", [{}, DAVEL], ids=["ccnet", "davel"])
def test_the_graph_of_opset_17_computes_the_network(absent: dict[str, Any], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from export.graph.to_onnx import export_onnx

    config = dataclasses.replace(TINY, levels=2, **absent)
    eager, spec = random_network(config), Config(model=config).spec(("a", "b", "c"))
    info = export_onnx(fused_network(eager), spec, tmp_path / "model.onnx", opset=17, batch=1)
    session = onnxruntime.InferenceSession(str(info.path), providers=["CPUExecutionProvider"])
    assert_same_outputs(eager, session, random_batch(config, [20]))


def assert_same_outputs(eager: CCNet, session: Any, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    with torch.inference_mode():
        expected = eager(*batch)
    got = session.run(None, {n: x.numpy() for n, x in zip(INPUT_NAMES, engine_inputs(*batch), strict=True)})
    valid = valid_points(batch[2], eager.config.levels)
    for one, other in zip(expected, got, strict=True):
        assert (one - torch.from_numpy(other))[valid].abs().max() < 1e-5  # measured: 9e-7
