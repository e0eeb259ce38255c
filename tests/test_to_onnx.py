"""The ONNX file is what was asked for, or there is an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from export.graph.to_onnx import EXTERNAL_BYTES, audit, example_inputs, export_onnx
from runtime.errors import ExportError
from runtime.spec import ModelSpec

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SPEC = ModelSpec(length=8, levels=2, visual_dim=6, audio_dim=4, labels=("a", "b", "c"))
POINTS = SPEC.grid.num_points


class Toy(nn.Module):
    """The forward contract with one of each operator that matters: convolution, norm, GELU, softmax, split."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.mix = nn.Conv1d(10, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)
        self.classes = nn.Linear(width // 3, 3)

    def forward(
        self, visual: torch.Tensor, audio: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        valid = torch.arange(visual.shape[1])[:, None] < lengths[:, None, None]
        steps = self.mix((torch.cat([visual, audio], 2) * valid).transpose(1, 2)).transpose(1, 2)
        query, key, value = torch.split(F.gelu(self.norm(steps)), steps.shape[2] // 3, dim=2)
        attended = (query @ key.transpose(1, 2)).softmax(-1) @ value
        attended = attended - attended.mean(2, keepdim=True) + torch.amax(attended, 1, keepdim=True)
        logits = self.classes(torch.cat([attended, attended[:, ::2]], 1))
        return logits, torch.stack([logits, 2 * logits], -1).relu()


class Changed(Toy):
    """`Toy` with something done to its outputs."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(
        self, visual: torch.Tensor, audio: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, offsets = super().forward(visual, audio, lengths)
        return self.change(logits), offsets


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


def run(path: Path, batch: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the outputs of the file and of the module it was made from."""
    inputs = example_inputs(SPEC, batch)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = ("visual", "audio", "lengths")
    found = session.run(["logits", "offsets"], {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    with torch.inference_mode():
        return found, [tensor.numpy() for tensor in toy()(*inputs)]


@pytest.mark.parametrize("opset", [17, 18, 20])
def test_computes_what_the_module_computes_at_every_batch_size(tmp_path: Path, opset: int) -> None:
    info = export_onnx(toy(), SPEC, tmp_path / "model.onnx", opset=opset, max_batch=5, metadata={"length": "8"})
    for batch in (1, 2, 3, 5):
        for found, expected in zip(*run(info.path, batch), strict=True):
            # Values of size 1; the same sums in another order.
            np.testing.assert_allclose(found, expected, atol=2e-6)
    model = onnx.load(info.path)
    assert {entry.version for entry in model.opset_import} == {opset} == {info.opset}
    assert info.nodes == len(model.graph.node) == sum(info.operators.values())
    assert {entry.key: entry.value for entry in model.metadata_props} == {"length": "8"}
    assert ("Gelu" in info.operators) == (opset >= 20)
    if opset == 17:
        assert all(len(node.input) == 1 for node in model.graph.node if node.op_type in ("ReduceMean", "ReduceMax"))
        assert all(node.attribute for node in model.graph.node if node.op_type in ("ReduceMean", "ReduceMax"))
        assert not [
            a for node in model.graph.node if node.op_type == "Split" for a in node.attribute if a.name != "axis"
        ]


@pytest.mark.parametrize("max_batch", [1, 2])
def test_a_small_largest_batch_leaves_the_batch_axis_free(tmp_path: Path, max_batch: int) -> None:
    """The exporter takes an axis of up to 2 for three different ones, as its example has 2 videos."""
    path = tmp_path / "model.onnx"
    export_onnx(toy(), SPEC, path, max_batch=max_batch)
    audit(path, SPEC, opset=20, batch=None)


def test_nothing_about_the_building_machine_is_left_in_the_file(tmp_path: Path) -> None:
    info = export_onnx(toy(), SPEC, tmp_path / "model.onnx")
    content = info.path.read_bytes()
    for word in (b"stack_trace", b".py", str(Path(__file__).parent).encode(), b"fx_node"):
        assert word not in content
    again = export_onnx(toy(), SPEC, tmp_path / "again.onnx")
    assert again.path.read_bytes() == content


def test_a_fixed_batch_is_fixed(tmp_path: Path) -> None:
    info = export_onnx(toy(), SPEC, tmp_path / "model.onnx", batch=3)
    shapes = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in onnx.load(info.path).graph.input]
    assert shapes == [[3, 8, 6], [3, 8, 4], [3]]
    for found, expected in zip(*run(info.path, 3), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-6)
    with pytest.raises(ExportError, match="expected \\('batch', 8, 6\\)"):
        audit(info.path, SPEC, opset=20, batch=None)


def test_large_weights_lie_beside_the_graph(tmp_path: Path) -> None:
    wide = Toy(width=EXTERNAL_BYTES // 4 // 30 // 3 * 3 + 30).eval()
    info = export_onnx(wide, SPEC, tmp_path / "model.onnx")
    assert info.files == ("model.onnx", "model.onnx.data")
    assert (tmp_path / "model.onnx").stat().st_size < 1 << 20
    assert (tmp_path / "model.onnx.data").stat().st_size >= EXTERNAL_BYTES
    assert onnxruntime.InferenceSession(str(info.path), providers=["CPUExecutionProvider"])


def unequal_parts(x: torch.Tensor) -> torch.Tensor:
    return torch.split_with_sizes(torch.cat([x, x, x]), [x.shape[0], 2 * x.shape[0]])[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.view(2, POINTS, 3), "torch.export|shape"),
        (lambda x: x.double(), "float64|DOUBLE"),
        (lambda x: (x.double() * 2).float(), "float64"),
        (lambda x: x[:, 1:], "shape"),
        (lambda x: x * 2 if x.shape[0] == 2 else x, "torch.export|shape"),
        (lambda x: x * 2 if x.sum() > 3 else x, "torch.export"),
        (unequal_parts, "2 parts whose sizes depend on the batch and are not one value"),
    ],
    ids=[
        "batch fixed by a view",
        "float64 out",
        "float64 inside",
        "a point less",
        "batch in an if",
        "data in an if",
        "unequal parts of the batch",
    ],
)
def test_a_module_that_breaks_the_contract_is_an_error(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(Changed(change).eval(), SPEC, tmp_path / "model.onnx")


@pytest.mark.parametrize("arguments", [{"opset": 16}, {"opset": 99}, {"max_batch": 0}, {"batch": 0}])
def test_bad_arguments(tmp_path: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(ExportError, match="expected"):
        export_onnx(toy(), SPEC, tmp_path / "model.onnx", **arguments)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_the_audit_sees_a_foreign_file(tmp_path: Path) -> None:
    info = export_onnx(toy(), SPEC, tmp_path / "model.onnx")
    with pytest.raises(ExportError, match="operator sets"):
        audit(info.path, SPEC, opset=19, batch=None)
    other = dataclasses.replace(SPEC, labels=("a", "b"))
    with pytest.raises(ExportError, match="logits"):
        audit(info.path, other, opset=20, batch=None)
    model = onnx.load(info.path)
    model.graph.input[0].name = "video"
    for node in model.graph.node:
        node.input[:] = ["video" if name == "visual" else name for name in node.input]
    onnx.save(model, info.path)
    with pytest.raises(ExportError, match="video"):
        audit(info.path, SPEC, opset=20, batch=None)
