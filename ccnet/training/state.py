"""The state a run resumes from: `last/`, a checkpoint with `training.safetensors` and `training.json` in it.

It is written as one folder, so that its files always belong to the same step: after a kill, or on a full disk, the
previous state is still whole.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ccnet.checkpoint import (
    check_file,
    load_tensors,
    read_checkpoint,
    refuse_foreign_folder,
    save_tensors,
    write_checkpoint,
)
from ccnet.config import Config
from ccnet.training.learner import Learner
from runtime.errors import CheckpointError, ConfigError
from runtime.files import sha256_file, write_json
from runtime.folders import atomic_folder, recover_folder
from runtime.records import BadRecord, read_json
from runtime.schema import require, section_from_json

SCHEMA = 1
STATE = "training.json"
TENSORS = "training.safetensors"

_FREE_TO_CHANGE = ("train.device", "train.workers")
"""Settings that do not change what is learned; all others have to be the same to continue a run."""


@dataclass(kw_only=True)
class Position:
    """How far a run is, and the sums and rows of its tables."""

    epoch: int = 0
    """Finished epochs."""
    batch: int = 0
    """Batches done of the current epoch."""
    best_map: float | None = None
    """Best validation mAP so far, which is the one of `best/`."""
    best_epoch: int = 0
    window_steps: int = 0
    window_sums: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    """Sums of `LOSS_COLUMNS` over the steps since the last row of steps.csv."""
    epoch_sums: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    """The same over the epoch's steps before that."""
    epoch_seconds: float = 0.0
    epoch_loading_seconds: float = 0.0
    epochs: tuple[dict[str, Any], ...] = ()
    """Rows of metrics.csv."""
    steps: tuple[dict[str, Any], ...] = ()
    """Rows of steps.csv."""


@dataclass(frozen=True, kw_only=True)
class _Manifest:
    """Content of `training.json`."""

    schema: int
    position: dict[str, Any]
    scaler: dict[str, Any]
    annotations_sha256: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """A state whose manifests have been read; `restore` reads its tensors."""

    folder: Path
    config: Config
    labels: tuple[str, ...]
    position: Position
    manifest: _Manifest = field(repr=False)

    def restore(self, learner: Learner) -> None:
        """Restore a new Learner to this state. Raises CheckpointError when a file is damaged."""
        path = self.folder / TENSORS
        check_file(path, size=self.manifest.size, sha256=self.manifest.sha256, said_by=STATE)
        average = read_checkpoint(self.folder).load_model()
        learner.restore(load_tensors(path), self.manifest.scaler, average, source=path)


def save_state(
    folder: Path,
    learner: Learner,
    position: Position,
    *,
    labels: tuple[str, ...],
    annotations_sha256: str,
    metrics: dict[str, Any],
) -> None:
    """Replace the state in `folder`. Raises OSError, and leaves the previous state, when the disk is full."""
    refuse_foreign_folder(folder)
    with atomic_folder(folder) as partial:
        write_checkpoint(partial, learner.average.model, config=learner.config, labels=labels, metrics=metrics)
        path = partial / TENSORS
        tensors: dict[str, Tensor] = learner.tensors()
        save_tensors(path, tensors)
        manifest = _Manifest(
            schema=SCHEMA,
            position=dataclasses.asdict(position),
            scaler=learner.scaler_state(),
            annotations_sha256=annotations_sha256,
            size=path.stat().st_size,
            sha256=sha256_file(path),
        )
        write_json(partial / STATE, dataclasses.asdict(manifest))


def open_run(out: Path, config: Config, *, annotations_sha256: str, resume: bool) -> TrainingState | None:
    """Return the state to continue from, or None for a new run in `out`.

    Raises CheckpointError when there is nothing to resume, when `out` holds a run and `resume` is false, or when that
    run has another configuration (the differing keys are named) or annotation file.
    """
    last = out / "last"
    for folder in (last, out / "best"):
        recover_folder(folder)
    if not (last / STATE).is_file():
        if resume:
            raise CheckpointError(
                f"{out}: nothing to resume, it has no last/{STATE}; leave out --resume to start a run"
            )
        for folder in (last, out / "best"):
            refuse_foreign_folder(folder)
        return None
    state = read_state(last)
    differing = _differing(state.config, config)
    if differing:
        raise CheckpointError(
            f"{out}: holds a run of another configuration: {'; '.join(differing)}. Use its settings, or another folder"
        )
    if not resume:
        raise CheckpointError(
            f"{out}: holds a run already ({state.position.epoch} epochs done); add --resume to continue it, or choose "
            "another folder"
        )
    if state.manifest.annotations_sha256 != annotations_sha256:
        raise CheckpointError(
            f"{out}: the run was started with another annotation file; use that one, or another folder"
        )
    return state


def read_state(folder: Path) -> TrainingState:
    """Read `training.json` and `checkpoint.json`. Raises CheckpointError when they are damaged."""
    path = folder / STATE
    checkpoint = read_checkpoint(folder)
    try:
        manifest = section_from_json(_Manifest, read_json(path), where=STATE)
        position = section_from_json(Position, manifest.position, where=f"{STATE}.position")
        require(manifest.schema == SCHEMA, f"{STATE}.schema", manifest.schema, str(SCHEMA))
    except (BadRecord, ConfigError) as error:
        raise CheckpointError(
            f"{path}: {error}; the state is damaged or of another version, start the run again"
        ) from error
    return TrainingState(
        folder=folder, config=checkpoint.config, labels=checkpoint.labels, position=position, manifest=manifest
    )


def _differing(before: Config, now: Config) -> list[str]:
    old, new = _flat(before.to_json()), _flat(now.to_json())
    return [
        f"{key} is {old.get(key)!r} there, {new.get(key)!r} was asked for"
        for key in sorted(set(old) | set(new))
        if key not in _FREE_TO_CHANGE and old.get(key) != new.get(key)
    ]


def _flat(data: dict[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": value for section, fields in data.items() for name, value in fields.items()}
