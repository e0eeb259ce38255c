"""Whether a training run fits the memory of its device, said before it starts and not by the system that ends it.

What is counted is what surely is there at once: weights, their gradients, Adam's two moments, the averaged weights,
the tensors that the backward pass keeps, and a batch. Temporary tensors come on top, so a run that is refused here
would have failed; one that passes may still be tight. Kept tensors are counted by running the network on tensors
without content.

Shapes:  P points of all levels   C classes   H hidden width per class   D model width
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ccnet.config import Config
from ccnet.network.model import CCNet
from runtime.errors import TrainingError
from runtime.spec import point_grid

log = logging.getLogger(__name__)

_COPIES = 60
"""More tensors of [P, C H + 16 D] than the backward pass keeps of a video: measured 52 of [P, C H] at full size."""
_TIGHT = 1.3
"""Measured peak of steps on a CPU, in what is counted: 1.21 to 1.32."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of a training run, by what they are for."""

    weights: int
    """Of the parameters, float32; gradients and averaged weights have as many, Adam twice as many."""
    activations: int
    """What the backward pass keeps of a batch."""
    batch: int
    """Features and targets of a batch."""

    @property
    def total(self) -> int:
        return 5 * self.weights + self.activations + self.batch

    def text(self, videos: int) -> str:
        """Return the sum in words."""
        parts = {
            "weights": self.weights,
            "gradients": self.weights,
            "Adam": 2 * self.weights,
            "averaged weights": self.weights,
            f"activations of {videos} videos": self.activations,
            "inputs and targets": self.batch,
        }
        terms = " + ".join(f"{size / 1e9:.1f} ({name})" for name, size in parts.items())
        return f"{self.total / 1e9:.1f} GB = {terms}"


def training_memory(config: Config) -> TrainingMemory:
    """Count what a run of this configuration surely needs. Takes some seconds, whatever the size of the network."""
    model, train = config.model, config.train
    kept: dict[int, int] = {}
    tensors: list[torch.Tensor] = []  # alive, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        tensors.append(tensor)
        return tensor

    with torch.random.fork_rng([]), FakeTensorMode():
        network: nn.Module = CCNet(model).train()
        visual = torch.zeros(train.batch_size, model.visual_dim, model.length)
        audio = torch.zeros(train.batch_size, model.audio_dim, model.length)
        mask = torch.ones(train.batch_size, 1, model.length, dtype=torch.bool)
        half = train.precision != "fp32"
        with (
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            network(visual, audio, mask)
        weights = sum(parameter.numel() for parameter in network.parameters())
        for parameter in network.parameters():
            kept.pop(parameter.untyped_storage()._cdata, None)
    return TrainingMemory(4 * weights, sum(kept.values()), _batch_bytes(config))


def check_memory(config: Config, device: torch.device) -> None:
    """Raise TrainingError, with the sum and what would fit, where a run surely does not fit its device's memory."""
    free = free_bytes(device)
    if free is None or 2 * _roughly(config) < free:
        return
    need = training_memory(config)
    where = f"{device} has {free / 1e9:.1f} GB free"
    videos = config.train.batch_size
    if need.total > free:
        one = training_memory(dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=1)))
        per_video = max(1, (need.total - one.total) // max(1, videos - 1))
        fitting = int(1 + (free / _TIGHT - one.total) // per_video)
        also = ", or train.precision bf16" if config.train.precision == "fp32" else ""
        advice = f"train.batch_size {fitting}{also}" if fitting >= 1 else "more memory, or a smaller network"
        raise TrainingError(f"training needs at least {need.text(videos)}; {where}. Use {advice}")
    if _TIGHT * need.total > free:
        log.warning("memory may not suffice: training needs at least %s; %s", need.text(videos), where)


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device, of this process's control group where that is less; None where unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [_meminfo("MemAvailable"), _group_free()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def _roughly(config: Config) -> int:
    """Return a quick figure above what `training_memory` counts, to spare most runs the count."""
    model, points = config.model, point_grid(config.model.length, config.model.levels).num_points
    wide = model.num_classes * model.tdm_dim
    weights = 12 * model.dim * wide + 2 * model.num_classes * model.length**2 + 500 * model.dim**2
    kept = config.train.batch_size * points * _COPIES * (wide + 16 * model.dim)
    return 4 * (5 * weights + kept) + _batch_bytes(config)


def _batch_bytes(config: Config) -> int:
    model = config.model
    points = point_grid(model.length, model.levels).num_points
    return (
        4
        * config.train.batch_size
        * (model.length * (model.visual_dim + model.audio_dim) + 3 * points * model.num_classes)
    )


def _meminfo(key: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _group_free(folder: str = "/sys/fs/cgroup") -> int | None:
    """Return what the memory limit of a container leaves; None without a limit."""
    try:
        limit = (Path(folder) / "memory.max").read_text(encoding="ascii").strip()
        used = int((Path(folder) / "memory.current").read_text(encoding="ascii"))
        return None if limit == "max" else max(0, int(limit) - used)
    except (OSError, ValueError):
        return None
