"""Puts a bundle together, or changes one, in a folder beside it that takes its place only when it is whole.

A kill, a full disk or a failed parity check leaves what was there before: the old bundle, or none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Generic, TypeVar

from runtime.bundle import (
    MANIFEST,
    PARITY,
    SCHEMA,
    AnyContents,
    Bundle,
    Engine,
    FileRecord,
    Manifest,
    ModelFile,
    ModelFolder,
    read_bundle,
)
from runtime.errors import BundleError
from runtime.files import sha256_file, write_json
from runtime.folders import atomic_folder
from runtime.records import BadRecord, get_values, read_json
from runtime.schema import show
from runtime.spec import ModelSpec

PARITY_SCHEMA = 1


class FolderDraft(Generic[AnyContents]):
    """A folder of model files in the making. The caller writes files into `folder`; the manifest comes last."""

    def __init__(self, folder: Path, manifest: AnyContents, parity: dict[str, Any]) -> None:
        """Use `new_folder`, `new_bundle` or `changed_bundle`."""
        self.folder = folder
        self._manifest = manifest
        self._parity = parity

    @property
    def manifest(self) -> AnyContents:
        return self._manifest

    def add_model_file(self, model_file: ModelFile) -> None:
        """Take up a model file whose files are in `folder`; one of the same name is replaced.

        Raises BundleError when a file is missing or belongs to another model file.
        """
        others = tuple(a for a in self._manifest.model_files if a.name != model_file.name)
        for name in model_file.files:
            owner = next((other.name for other in others if name in other.files), None)
            if owner is not None:
                raise BundleError(f"{self.folder.name}: file '{name}' of '{model_file.name}' belongs to '{owner}'")
            if not (self.folder / name).is_file():
                raise BundleError(f"{self.folder / name}: missing, though '{model_file.name}' lists it")
        replaced = {name for a in self._manifest.model_files if a.name == model_file.name for name in a.files}
        self._manifest = dataclasses.replace(self._manifest, model_files=(*others, model_file))
        self._record(model_file.files, replaced)

    def add_file(self, name: str) -> None:
        """Take up a file that is no model file and lies in `folder`; one of the same name is replaced."""
        self._record((name,))

    def _record(self, names: Sequence[str], replaced: Collection[str] = ()) -> None:
        """Put files on record, in place of those that are replaced."""
        kept = tuple(r for r in self._manifest.files if r.name not in replaced and r.name not in names)
        added = tuple(_file_record(self.folder / name) for name in names)
        self._manifest = dataclasses.replace(self._manifest, files=(*kept, *added))

    def set_engine(self, engine: Engine, report: dict[str, Any] | None = None) -> None:
        """Add or replace an engine and its report."""
        others = [other for other in self._manifest.engines if other.name != engine.name]
        self._manifest = dataclasses.replace(self._manifest, engines=_ranked([*others, engine]))
        if report is None:
            self._parity["engines"].pop(engine.name, None)
        else:
            self._parity["engines"][engine.name] = report

    def write(self) -> None:
        """Write the reports and the manifest."""
        write_json(self.folder / PARITY, self._parity)
        self._record((PARITY,))
        write_json(self.folder / self._manifest.FILE, self._manifest.to_json())


class Draft(FolderDraft[Manifest]):
    """A bundle in the making."""

    def bundle(self) -> Bundle:
        """Write the reports and the manifest, and read the bundle as the runtime does."""
        self.write()
        return read_bundle(self.folder)


AnyDraft = TypeVar("AnyDraft", bound=FolderDraft[Any])


@contextlib.contextmanager
def new_folder(path: str | Path, manifest: AnyContents) -> Iterator[FolderDraft[AnyContents]]:
    """Open a draft that becomes the folder `path` when the block ends well; an earlier one of its kind is replaced.

    `manifest` is to list no files yet. Raises BundleError as `new_bundle`.
    """
    path = Path(path)
    refuse_foreign(path, manifest.FILE)
    with atomic_folder(path) as folder:
        draft = FolderDraft(folder, manifest, {"schema": PARITY_SCHEMA, "engines": {}})
        yield draft
        draft.write()
        _finish(draft, path)


@contextlib.contextmanager
def new_bundle(
    path: str | Path,
    *,
    spec: ModelSpec,
    model: dict[str, Any],
    checkpoint_sha256: str,
    versions: dict[str, str],
) -> Iterator[Draft]:
    """Open a draft that becomes the bundle `path` when the block ends well; an earlier bundle there is replaced.

    Raises BundleError when `path` is something else than a bundle or an empty folder, or the draft holds no model file.
    """
    path = Path(path)
    refuse_foreign(path)
    manifest = Manifest(
        schema=SCHEMA,
        spec=spec,
        model=model,
        checkpoint_sha256=checkpoint_sha256,
        versions=versions,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        files=(),
        model_files=(),
        engines=(),
    )
    with atomic_folder(path) as folder:
        draft = Draft(folder, manifest, {"schema": PARITY_SCHEMA, "engines": {}})
        yield draft
        draft.bundle()
        _finish(draft, path)


@contextlib.contextmanager
def changed_bundle(path: str | Path) -> Iterator[Draft]:
    """Open a draft that starts as the bundle `path`; see `changed_folder`."""
    with _changed(Path(path), read_bundle, Draft) as draft:
        yield draft


@contextlib.contextmanager
def changed_folder(
    path: str | Path, read: Callable[[str | Path], ModelFolder[AnyContents]]
) -> Iterator[FolderDraft[AnyContents]]:
    """Open a draft that starts as the folder `path` and takes its place when the block ends well.

    Unchanged files are linked, not copied, where the file system can. A file must be replaced in the draft, never
    written into: the folder in use shares its content. Raises BundleError when `read` finds that `path` is not whole.
    """
    with _changed(Path(path), read, FolderDraft) as draft:
        yield draft


@contextlib.contextmanager
def _changed(
    path: Path, read: Callable[[str | Path], ModelFolder[Any]], kind: Callable[..., AnyDraft]
) -> Iterator[AnyDraft]:
    manifest = read(path).manifest
    reports = path / PARITY
    parity = {"schema": PARITY_SCHEMA, "engines": {}}
    if reports.is_file():
        try:
            parity["engines"] = _reports(read_json(reports))
        except BadRecord as error:
            raise BundleError(f"{reports}: not a file of parity reports ({error}); copy the bundle again") from None
    with atomic_folder(path) as folder:
        shutil.copytree(path, folder, copy_function=_link_or_copy, dirs_exist_ok=True)
        draft = kind(folder, manifest, parity)
        yield draft
        draft.write()
        read(folder)
        _finish(draft, path)


def _reports(content: Any) -> dict[str, Any]:
    (engines,) = get_values(content, ("engines",))
    if not isinstance(engines, dict):
        raise BadRecord(f"engines: got {show(engines)}, expected an object")
    return engines


def refuse_foreign(path: Path, manifest: str = MANIFEST) -> None:
    """Raise BundleError when `path` exists and is neither a bundle nor an empty folder: it would be replaced."""
    if path.is_dir() and (not any(path.iterdir()) or (path / manifest).is_file()):
        return
    if path.exists():
        raise BundleError(f"{path}: exists and is no bundle; name another place with --out")


def _finish(draft: FolderDraft[Any], path: Path) -> None:
    if not draft.manifest.model_files:
        raise BundleError(f"{path}: a bundle needs a model file")
    for record in draft.manifest.files:
        with open(draft.folder / record.name, "rb") as stream:
            os.fsync(stream.fileno())


def _ranked(engines: list[Engine]) -> tuple[Engine, ...]:
    """Return the verified engines first, of those the fastest measured one; failed ones last."""

    def rank(engine: Engine) -> tuple[int, float]:
        status = ("verified", "unverified", "failed").index(engine.status)
        return status, float(engine.speed.get("ms_per_video", float("inf")))

    return tuple(sorted(engines, key=rank))


def _file_record(path: Path) -> FileRecord:
    return FileRecord(name=path.name, size=path.stat().st_size, sha256=sha256_file(path))


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
