"""A checkpoint: a folder with `checkpoint.json` (configuration, labels, metrics, hash) and `model.safetensors`.

Nothing in it is pickled. The weights are the averaged (EMA) ones, which are those to evaluate and export. A folder is
written whole or not at all, and read strictly: size, SHA-256, tensor names and shapes have to fit its configuration.
PyTorch is needed for the weights alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ccnet.config import Config
from ccnet.version import __version__
from runtime.errors import CheckpointError, ConfigError
from runtime.files import sha256_file, write_json
from runtime.folders import atomic_folder
from runtime.packages import distribution_of, missing
from runtime.records import BadRecord, read_json
from runtime.schema import quote, show
from runtime.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ccnet.network.model import CCNet

SCHEMA = 1
MANIFEST = "checkpoint.json"
WEIGHTS = "model.safetensors"
_KEYS = ("schema", "config", "labels", "metrics", "weights", "created", "versions")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose `checkpoint.json` has been read and checked; `load_model` checks and reads the weights."""

    folder: Path
    config: Config
    labels: tuple[str, ...]
    """Class names; the index is the label id."""
    metrics: dict[str, Any]
    """What was measured when it was saved, for example `epoch` and `validation_map`; may be empty."""
    weights_size: int
    """Bytes of `model.safetensors`."""
    weights_sha256: str

    @property
    def spec(self) -> ModelSpec:
        """The inputs and outputs of this network."""
        return self.config.spec(self.labels)

    def load_model(self, device: str | torch.device = "cpu") -> CCNet:
        """Return the network with its weights, float32, in eval mode, on `device`.

        Raises CheckpointError when the weights are missing, truncated or altered, or belong to another configuration.
        """
        from ccnet.network.model import CCNet

        path = self.folder / WEIGHTS
        check_file(path, size=self.weights_size, sha256=self.weights_sha256, said_by=MANIFEST)
        tensors = load_tensors(path)
        config = self.config.model
        largest = 4 * max(config.dim, config.tdm_dim) * max(config.dim, config.visual_dim, config.audio_dim)
        if largest > self.weights_size:  # a damaged configuration may ask for any amount of memory
            raise CheckpointError(
                f"{path}: {self.weights_size} bytes, but one matrix of its configuration alone has {largest}; copy the "
                "checkpoint again"
            )
        model = CCNet(self.config.model)
        load_strictly(model, tensors, source=path)
        return model.eval().to(device)


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    config: Config,
    labels: Iterable[str],
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint folder; an earlier checkpoint there is replaced only once the new one is whole on disk.

    `model` is the network whose weights are saved (in training: the EMA copy). Raises CheckpointError when `folder`
    exists and is not a checkpoint, or when `model` was built with another configuration; OSError when the disk is full.
    """
    refuse_foreign_folder(folder)
    with atomic_folder(folder) as partial:
        write_checkpoint(partial, model, config=config, labels=labels, metrics=metrics)


def write_checkpoint(
    folder: Path,
    model: nn.Module,
    *,
    config: Config,
    labels: Iterable[str],
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Write the two files into an existing folder. For callers that make a larger folder atomic themselves."""
    import torch

    labels = tuple(labels)
    config.spec(labels)  # raises ConfigError when the labels do not fit the configuration
    built_with = getattr(model, "config", config.model)
    if built_with != config.model:
        raise CheckpointError(f"{folder}: the model was built with {built_with}, the configuration says {config.model}")
    path = folder / WEIGHTS
    save_tensors(path, model.state_dict())
    manifest = {
        "schema": SCHEMA,
        "config": config.to_json(),
        "labels": list(labels),
        "metrics": dict(metrics or {}),
        "weights": {"size": path.stat().st_size, "sha256": sha256_file(path)},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"ccnet": __version__, "torch": torch.__version__},
    }
    write_json(folder / MANIFEST, manifest)


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read and check `checkpoint.json`; the weights are not touched.

    Raises CheckpointError for a folder that is not a whole checkpoint, or is one of another schema.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if folder.is_file():
        raise CheckpointError(
            f"{folder}: got a file, expected a checkpoint folder; 'ccnet import-weights' makes one of a .pth.tar"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder; 'ccnet train' or 'ccnet import-weights' makes one")
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {MANIFEST}, so it is not a checkpoint{_look_below(folder)}")
    try:
        data = read_json(path)
    except BadRecord as error:
        raise CheckpointError(f"{path}: {error}; copy the checkpoint again") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise CheckpointError(f"{path}: got schema {show(schema)}, this version of ccnet reads {SCHEMA}")
    if set(data) != set(_KEYS):
        wrong = quote(", ".join(sorted(set(data) ^ set(_KEYS))))
        raise CheckpointError(f"{path}: unknown or missing key(s) {wrong}; expected exactly {', '.join(_KEYS)}")
    weights, labels, metrics = data["weights"], data["labels"], data["metrics"]
    if not isinstance(weights, dict) or not isinstance(weights.get("size"), int) or not weights.get("sha256"):
        raise CheckpointError(f"{path}: weights: got {show(weights)}, expected an object with 'size' and 'sha256'")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise CheckpointError(f"{path}: labels: expected a list of class names")
    if not isinstance(metrics, dict):
        raise CheckpointError(f"{path}: metrics: got {show(metrics)}, expected an object")
    try:
        config = Config.from_json(data["config"])
        config.spec(tuple(labels))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}; the checkpoint was made by another version of ccnet") from error
    return Checkpoint(
        folder=folder,
        config=config,
        labels=tuple(labels),
        metrics=metrics,
        weights_size=weights["size"],
        weights_sha256=str(weights["sha256"]),
    )


def load_checkpoint(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> CCNet:
    """Load the network of a checkpoint, in eval mode with its EMA weights; see `Checkpoint.load_model`.

    Raises CheckpointError, MissingDependency without PyTorch.
    """
    return read_checkpoint(folder).load_model(device)


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], *, source: object) -> None:
    """Load a state dict; one CheckpointError lists every unknown, missing and misshapen tensor."""
    expected = module.state_dict()
    unknown = sorted(set(tensors) - set(expected))
    missing = sorted(set(expected) - set(tensors))
    misshapen = [
        f"{name} is {list(tensors[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    problems = [
        f"{len(names)} {what}: {_first(names)}"
        for what, names in (("unknown", unknown), ("missing", missing), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{source}: its tensors do not fit the configuration: {'; '.join(problems)}. "
            "Use the configuration it was trained with"
        )
    module.load_state_dict(dict(tensors))


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors and wait until they are on the disk. Raises OSError where they can't be written."""
    library = _safetensors()
    try:
        library.torch.save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)
    except library.SafetensorError as error:  # a full disk, in the library's own words
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    with open(path, "rb+") as stream:
        os.fsync(stream.fileno())


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU. Raises CheckpointError when it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; copy the whole checkpoint folder again")
    library = _safetensors()
    try:
        tensors: dict[str, Tensor] = library.torch.load_file(path)
    except (library.SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({quote(error)}); copy the checkpoint again") from error
    return tensors


def check_file(path: Path, *, size: int, sha256: str, said_by: str) -> None:
    """Check a file against its manifest. Raises CheckpointError when it is missing, truncated or altered."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; copy the whole checkpoint folder again")
    found = path.stat().st_size
    if found != size:
        raise CheckpointError(f"{path}: {found} bytes, {said_by} says {size}; copy the checkpoint again")
    digest = sha256_file(path)
    if digest != sha256:
        raise CheckpointError(
            f"{path}: SHA-256 {digest[:16]}..., {said_by} says {sha256[:16]}...; the file was altered or belongs to "
            "another checkpoint: copy the checkpoint again"
        )


def refuse_foreign_folder(folder: str | os.PathLike[str]) -> None:
    """Raise CheckpointError when `folder` holds something that is not a checkpoint and that a save would delete."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / MANIFEST).is_file():
        raise CheckpointError(f"{folder}: exists and is not a checkpoint, so it is not replaced; choose another folder")


def _look_below(folder: Path) -> str:
    below = [name for name in ("best", "last") if (folder / name / MANIFEST).is_file()]
    return f"; it holds {' and '.join(str(folder / name) for name in below)}" if below else ""


def _first(names: list[str], limit: int = 8) -> str:
    return quote(", ".join(names[:limit]), 150) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise missing(distribution_of(error.name) or "safetensors", "reading and writing checkpoints") from error
    return safetensors
