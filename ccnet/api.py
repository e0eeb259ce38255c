"""What a program calls: names of `ccnet` that need PyTorch, or an engine library, only when they are called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ccnet.config import Config, preset
from runtime.localizer import Localizer
from runtime.packages import distribution_of, missing

if TYPE_CHECKING:
    from ccnet.training.loop import TrainingResult


def load_bundle(folder: str | Path, backend: str = "auto", **options: Any) -> Localizer:
    """Return a bundle ready to localize events; takes and raises as `Localizer.load`."""
    return Localizer.load(folder, backend, **options)


def train(
    config: Config | str,
    annotations: str | Path,
    features: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    quiet: bool = False,
    classes: Sequence[str] | None = None,
) -> TrainingResult:
    """Train on the subset `train`, validate on `validation`; see `ccnet.training.loop.train`.

    `config` may be the name of a preset. Raises MissingDependency without PyTorch.
    """
    try:
        from ccnet.training.loop import train as train_network
    except ModuleNotFoundError as error:
        distribution = distribution_of(error.name)
        if distribution is None:
            raise
        raise missing(distribution, "training") from error
    settings = preset(config) if isinstance(config, str) else config
    return train_network(settings, annotations, features, out, resume=resume, quiet=quiet, classes=classes)
