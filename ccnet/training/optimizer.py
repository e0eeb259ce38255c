"""Optimisation: which parameters decay, the learning rate of every step, the averaged weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ccnet.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """Return AdamW in which convolution and linear weights decay, norms, biases and scales do not (paper, section 4).

    The fused kernel updates all parameters in one pass, on a CPU as well as on a GPU.
    """
    decaying = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Conv1d | nn.Linear | nn.Embedding)
    }
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if id(p) in decaying], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in decaying], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.learning_rate, fused=True)


def learning_rate(step: int, *, steps_per_epoch: int, config: TrainConfig) -> float:
    """Return the rate of the 0-based `step`: a linear warm-up, then half a cosine down to the smallest rate."""
    warmup = config.warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    share = min(1.0, (step - warmup) / (config.epochs * steps_per_epoch))
    span = config.learning_rate - config.min_learning_rate
    return config.min_learning_rate + 0.5 * span * (1 + math.cos(math.pi * share))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


class AveragedWeights:
    """Exponential moving average of a model's weights, kept as a second model in eval mode."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Set `average = decay * average + (1 - decay) * weights`, in one kernel launch per device."""
        average: list[Tensor] = list(self.model.parameters())
        weights: list[Tensor] = list(model.parameters())
        torch._foreach_lerp_(average, weights, 1 - self.decay)
