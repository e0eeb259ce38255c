"""Learner: everything that a training step changes, how a step changes it, and how it is saved and restored."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from ccnet.checkpoint import load_strictly
from ccnet.config import Config
from ccnet.network.model import CCNet
from ccnet.training.dataset import Batch
from ccnet.training.losses import DetectionLoss
from ccnet.training.optimizer import AveragedWeights, make_optimizer, set_learning_rate
from runtime.errors import BackendUnavailable, CheckpointError, ConfigError

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Return the device of `train.device`; `auto` is the first GPU where there is one, else the CPU.

    Raises ConfigError for another name, BackendUnavailable for an absent device.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"train.device: got {name!r}, expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"train.device: got {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendUnavailable(
            f"train.device: '{name}' was asked for, PyTorch {torch.__version__} sees {torch.cuda.device_count()} GPUs; "
            "use --train.device auto or cpu, or install PyTorch for your GPU"
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def describe_device(device: torch.device) -> str:
    """Return a device as text: `cpu, 2 threads` or `cuda:0, NVIDIA ...`."""
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"cpu, {torch.get_num_threads()} threads"


class Learner:
    """Network, averaged weights, losses, optimiser and random generators of one run.

    The weights, and what stochastic depth draws, follow from `config.train.seed`: the global random generators are
    seeded here, so wrap the use of a Learner in `torch.random.fork_rng` where they matter to others.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        precision = config.train.precision
        if precision == "fp16" and device.type == "cpu":
            raise ConfigError("train.precision: got 'fp16' on a CPU, expected fp32 or bf16")
        torch.manual_seed(config.train.seed)
        self.config = config
        self.device = device
        self.model = CCNet(config.model).to(device).train()
        self.average = AveragedWeights(self.model, config.train.ema)
        self.criterion = DetectionLoss(config.loss).to(device)
        self.optimizer = make_optimizer(self.model, config.train)
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._network: nn.Module = self.model
        if config.train.compile:
            self._network = torch.compile(self.model)  # type: ignore[assignment]

    def step(self, batch: Batch, rate: float) -> Tensor:
        """Learn from one batch on `device`. Returns [4], see `journal.LOSS_COLUMNS`, without waiting for a GPU."""
        set_learning_rate(self.optimizer, rate)
        with self._arithmetic():
            logits, offsets = self._network(batch.visual, batch.audio, batch.mask)
        valid = torch.cat([batch.mask[:, 0, :: 2**level] for level in range(self.config.model.levels)], dim=1)
        losses = self.criterion(logits, offsets, batch.targets, valid)
        self.optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(losses.total).backward()
        self._scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.average.update(self.model)
        return torch.stack((losses.total, losses.classification, losses.offset, norm)).detach()

    def tensors(self) -> dict[str, Tensor]:
        """Return all state but the averaged weights: `model/...`, `criterion/...`, `optimizer/...`, `random/...`."""
        state = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        state |= {f"criterion/{name}": tensor for name, tensor in self.criterion.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"optimizer/{key}/{name}"] = value
        state["random/cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            state["random/cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def scaler_state(self) -> dict[str, Any]:
        """Return the state of the fp16 loss scaling, as JSON; empty for other precisions."""
        return self._scaler.state_dict()

    def restore(self, tensors: dict[str, Tensor], scaler: dict[str, Any], average: CCNet, *, source: object) -> None:
        """Restore what `tensors` returned. Raises CheckpointError listing what is unknown, missing or misshapen."""
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "criterion": {}, "optimizer": {}, "random": {}}
        for key, tensor in tensors.items():
            group, _, name = key.partition("/")
            if group not in groups:
                raise CheckpointError(
                    f"{source}: unknown tensor '{key}'; the state was made by another version of ccnet"
                )
            groups[group][name] = tensor
        load_strictly(self.model, groups["model"], source=source)
        load_strictly(self.criterion, groups["criterion"], source=source)
        self.average.model.load_state_dict(average.state_dict())
        parameters = dict(self.model.named_parameters())
        for key, tensor in groups["optimizer"].items():
            kind, _, name = key.partition("/")
            if name not in parameters:
                raise CheckpointError(
                    f"{source}: unknown tensor 'optimizer/{key}'; it belongs to another configuration"
                )
            _check_moment(kind, tensor, parameters[name], f"{source}: tensor 'optimizer/{key}'")
            # The fused kernel wants its step counter where the parameter is.
            self.optimizer.state[parameters[name]][kind] = tensor.to(self.device, copy=True)
        self._scaler.load_state_dict(scaler)
        if "cpu" not in groups["random"]:
            raise CheckpointError(
                f"{source}: missing tensor 'random/cpu'; the state was made by another version of ccnet"
            )
        generator = groups["random"]["cpu"]
        if generator.dtype != torch.uint8 or generator.shape != torch.get_rng_state().shape:
            raise CheckpointError(f"{source}: tensor 'random/cpu' is not the state of a random generator")
        torch.set_rng_state(generator)
        if self.device.type == "cuda" and "cuda" in groups["random"]:
            torch.cuda.set_rng_state(groups["random"]["cuda"], self.device)

    def _arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.train.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=_AUTOCAST[self.config.train.precision])


def _check_moment(kind: str, tensor: Tensor, parameter: Tensor, where: str) -> None:
    """Raise CheckpointError unless AdamW takes a tensor as this part of its state of a parameter."""
    shapes = {"step": torch.Size([]), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    if kind not in shapes:
        raise CheckpointError(f"{where}: unknown; the state was made by another version of ccnet")
    if tensor.shape != shapes[kind] or not tensor.is_floating_point():
        raise CheckpointError(
            f"{where}: got {list(tensor.shape)} of {tensor.dtype}, expected floats of {list(shapes[kind])}; "
            "it belongs to another configuration"
        )
