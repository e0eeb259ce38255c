"""Eager PyTorch behind the backend protocol."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ccnet.network.model import released_inputs
from ccnet.torch_backend import TorchBackend
from runtime.errors import BackendUnavailable, ConfigError, EngineError, FeatureError
from runtime.spec import ModelSpec

SPEC = ModelSpec(length=8, levels=2, visual_dim=6, audio_dim=4, labels=("a", "b", "c"))


class Toy(nn.Module):
    """The forward contract with one linear layer, dropout, and a record of how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 3)
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).eval()
        self.seen: dict[str, object] = {}

    def forward(
        self, visual: torch.Tensor, audio: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        steps = torch.cat([visual, audio], 1).transpose(1, 2) * mask.transpose(1, 2)
        logits = self.dropout(self.linear(torch.cat([steps, steps[:, ::2]], 1)))
        self.seen = {
            "training": self.training,
            "inference": torch.is_inference_mode_enabled(),
            "dtype": logits.dtype,
            "matmul": torch.backends.cuda.matmul.fp32_precision,
        }
        return logits, torch.stack([logits, 2 * logits], -1).relu()


def inputs(batch: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 9, batch, dtype=np.int32)
    visual, audio = generator.normal(size=(2, batch, 8, 6)).astype(np.float32)
    return visual, audio[..., :4], lengths


def test_outputs_are_the_modules_own_as_float32_arrays() -> None:
    model = Toy().eval()
    backend = TorchBackend(model, SPEC)
    logits, offsets = backend.infer(*inputs())
    expected, _ = model(*released_inputs(*(torch.from_numpy(a) for a in inputs())))
    np.testing.assert_array_equal(logits, expected.detach().numpy())
    assert logits.dtype == offsets.dtype == np.float32
    assert offsets.shape == SPEC.output_shapes(2)["offsets"]
    assert backend.describe()["version"] == torch.__version__


def test_runs_in_evaluation_and_inference_mode_and_restores_every_module() -> None:
    model = Toy()
    assert model.dropout.training
    backend = TorchBackend(model, SPEC)
    first, second = backend.infer(*inputs()), backend.infer(*inputs())
    np.testing.assert_array_equal(first[0], second[0])
    assert model.seen["training"] is False
    assert model.seen["inference"] is True
    assert model.training
    assert model.dropout.training
    assert not model.frozen.training


def test_bf16_computes_in_bf16_and_returns_float32() -> None:
    model = Toy()
    exact = TorchBackend(model, SPEC).infer(*inputs())[0]
    logits = TorchBackend(model, SPEC, precision="bf16").infer(*inputs())[0]
    assert model.seen["dtype"] is torch.bfloat16
    assert logits.dtype == np.float32
    # bf16 keeps 8 bits: logits of size ~2 move by about 2**-8, and must move.
    assert 1e-5 < np.abs(logits - exact).max() < 0.05


def test_fp32_keeps_tf32_out_and_puts_the_switch_back() -> None:
    model = Toy()
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        TorchBackend(model, SPEC).infer(*inputs())
        assert model.seen["matmul"] == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_read_only_inputs_are_taken() -> None:
    arrays = inputs()
    for array in arrays:
        array.flags.writeable = False
    assert TorchBackend(Toy(), SPEC).infer(*arrays)[0].shape == (2, 12, 3)


@pytest.mark.parametrize("precision", ["int8", "tf32", "FP32"])
def test_a_precision_the_device_lacks_is_an_error(precision: str) -> None:
    with pytest.raises(ConfigError, match="precision"):
        TorchBackend(Toy(), SPEC, precision=precision)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_an_absent_gpu_is_an_error() -> None:
    with pytest.raises(BackendUnavailable, match="cuda"):
        TorchBackend(Toy(), SPEC, device="cuda")


def test_wrong_shapes_and_too_many_videos_are_feature_errors() -> None:
    visual, audio, lengths = inputs()
    backend = TorchBackend(Toy(), SPEC, max_batch=2)
    with pytest.raises(FeatureError, match="audio"):
        backend.infer(visual, audio[:, :3], lengths)
    with pytest.raises(FeatureError, match="lengths.*float32"):
        backend.infer(visual, audio, lengths.astype(np.float32))
    with pytest.raises(FeatureError, match="1 to 2"):
        backend.infer(*inputs(3))


def test_closed_twice_then_refuses_to_run() -> None:
    with TorchBackend(Toy(), SPEC) as backend:
        pass
    backend.close()
    with pytest.raises(EngineError, match="closed"):
        backend.infer(*inputs())
