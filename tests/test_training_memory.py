"""The memory check before training: the sum, what it advises, and that it does not touch the random numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ccnet.config import Config, ModelConfig, TrainConfig, preset
from ccnet.network.model import CCNet
from ccnet.training import memory
from ccnet.training.memory import check_memory, free_bytes, training_memory
from runtime.errors import TrainingError

CPU = torch.device("cpu")
CONFIG = Config(
    model=ModelConfig(length=64, levels=3, visual_dim=16, audio_dim=8, dim=32, num_classes=6, head_dim=32, tdm_dim=16),
    train=TrainConfig(batch_size=8),
)


def test_the_sum_is_that_of_the_tensors() -> None:
    before = torch.get_rng_state()
    need = training_memory(CONFIG)
    assert torch.equal(torch.get_rng_state(), before)
    network = CCNet(CONFIG.model).train()
    assert need.weights == 4 * sum(parameter.numel() for parameter in network.parameters())
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    features = (torch.randn(8, 16, 64), torch.randn(8, 8, 64), torch.ones(8, 1, 64, dtype=torch.bool))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(*features)
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    expected = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    assert need.activations == pytest.approx(expected, rel=0.02)  # measured: 0.4 % apart


def test_a_run_that_cannot_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    need = training_memory(CONFIG).total
    monkeypatch.setattr(memory, "free_bytes", lambda device: need // 2)
    with pytest.raises(
        TrainingError, match=r"training needs at least .*activations of 8 videos.*Use train.batch_size 2"
    ):
        check_memory(CONFIG, CPU)
    monkeypatch.setattr(memory, "free_bytes", lambda device: need // 100)
    with pytest.raises(TrainingError, match="Use more memory, or a smaller network"):
        check_memory(CONFIG, CPU)


def test_a_tight_run_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(1.1 * training_memory(CONFIG).total))
    check_memory(CONFIG, CPU)
    assert "memory may not suffice: training needs at least" in caplog.text


def test_enough_memory_costs_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "training_memory", lambda config: pytest.fail("counted"))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 40)
    for name in ("demo", "unav100"):
        check_memory(preset(name), CPU)
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)  # not known
    check_memory(preset("unav100"), CPU)


def test_half_precision_keeps_less() -> None:
    half = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, precision="bf16"))
    assert training_memory(half).activations < 0.8 * training_memory(CONFIG).activations


def test_free_memory_of_this_machine() -> None:
    free = free_bytes(CPU)
    assert free is None or free > 1 << 20
