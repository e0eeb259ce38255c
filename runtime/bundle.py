"""The deployable folder: a manifest, the model files it lists, and the ways to run them that were verified.

`bundle.json` is the manifest. Its *model files* are files (an ONNX graph with its external data, an engine); its
*engines* are ways to run a model file (backend + precision), each with the verdict of the parity check and,
where measured, its speed. Everything is verified by size and SHA-256 before an engine library sees it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from runtime.errors import BundleError, ConfigError
from runtime.files import file_identity, open_regular, sha256_file
from runtime.onnx_file import external_files
from runtime.records import BadRecord, is_number, read_json
from runtime.schema import quote, section_from_json, show
from runtime.spec import ModelSpec

SCHEMA = 2
MANIFEST = "bundle.json"
PARITY = "parity.json"
_LARGEST_MANIFEST, _LONGEST_NAME = 1 << 24, 255
"""Bytes, of the file and of a name in it."""

Format = Literal["onnx", "tensorrt", "tensorrt-rtx"]
Status = Literal["verified", "unverified", "failed"]


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of the bundle."""

    name: str
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """A graph or an engine: `files[0]` is the one to open, the others (external weights) lie beside it."""

    name: str
    """Unique in the bundle, for example `onnx-fp32` or `tensorrt-rtx-fp16`."""
    format: Format
    files: tuple[str, ...]
    precision: str
    """Precision of the weights and arithmetic that the file itself states."""
    max_batch: int
    opset: int | None = None
    library: str | None = None
    """What built an engine, for example `tensorrt_rtx`."""
    library_version: str | None = None
    gpu_name: str | None = None
    """GPU the engine was built on; None for a portable or ahead-of-time build."""
    compute_capabilities: tuple[str, ...] = ()
    """What the engine was built for, for example `8.9`; empty for ONNX."""
    profile: tuple[int, ...] | None = None
    """Optimization profile of the batch axis: (min, opt, max)."""
    onnx_sha256: str | None = None
    """The graph an engine was built from."""
    options: dict[str, Any] = field(default_factory=dict)
    """What an engine was built with, as `export.tensorrt.options.EngineOptions` writes and reads it."""
    build: dict[str, Any] = field(default_factory=dict)
    """Facts about the build: seconds, layers, bytes, requested and delivered precisions."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A way to run a model file, and what is known about it."""

    name: str
    """Unique in the bundle, for example `onnxruntime-fp32` or `openvino-bf16`."""
    backend: str
    """Name in `runtime.backends.registry.REGISTRY`."""
    precision: str
    model_file: str
    """Name of the model file it runs."""
    status: Status
    """`verified` against the eager model; `unverified`: not run where the bundle was made; `failed` the parity check,
    so that it is never run."""
    accuracy: dict[str, Any] = field(default_factory=dict)
    """Summary of the parity check: differences per tensor, matched events, mAP difference."""
    speed: dict[str, Any] = field(default_factory=dict)
    """Milliseconds per video and the machine they were measured on; empty when not measured."""


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What every manifest holds; a bundle's and an extractor's add what they are made of."""

    FILE: ClassVar[str]
    """Name of the manifest in its folder."""

    schema: int
    versions: dict[str, str]
    """Versions of the toolkit and of the libraries that made the folder."""
    created: str
    """UTC, ISO 8601."""
    files: tuple[FileRecord, ...]
    model_files: tuple[ModelFile, ...]
    engines: tuple[Engine, ...]
    """Ways to run the bundle: verified ones first, of those the fastest measured one; failed ones last."""

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return data


@dataclass(frozen=True, kw_only=True)
class Manifest(Contents):
    """Content of `bundle.json`."""

    FILE: ClassVar[str] = MANIFEST

    spec: ModelSpec
    model: dict[str, Any]
    """The `ModelConfig` the network was built with, as JSON."""
    checkpoint_sha256: str


AnyContents = TypeVar("AnyContents", bound=Contents)


@dataclass(frozen=True)
class ModelFolder(Generic[AnyContents]):
    """A folder of model files whose manifest has been read. `verify` checks the files."""

    folder: Path
    manifest: AnyContents

    def model_file(self, name: str) -> ModelFile:
        for model_file in self.manifest.model_files:
            if model_file.name == name:
                return model_file
        known = ", ".join(a.name for a in self.manifest.model_files)
        raise BundleError(f"{self.folder}: no model file '{name}'; it has: {known}")

    def path(self, model_file: ModelFile) -> Path:
        return self.folder / model_file.files[0]

    def verify(self, model_file: ModelFile | None = None) -> None:
        """Check size and SHA-256 of one model file's files, or of all files, and what graphs take from other files.

        Raises BundleError naming the file, what was found and what the manifest expects.
        """
        names = tuple(record.name for record in self.manifest.files) if model_file is None else model_file.files
        for name in names:
            self.verify_file(name)
        for graph in self.manifest.model_files if model_file is None else (model_file,):
            _check_external(self.folder, graph)

    @contextlib.contextmanager
    def checked(self, model_file: ModelFile) -> Iterator[Path]:
        """Verify a model file's files, and yield the path to load it from; what is loaded is what was verified.

        Links are not followed by every engine library: where a file is one, all are copied for the time of the block,
        into a folder of this user alone. Raises BundleError as `verify`, and at the end of the block when a file has
        changed since it was verified: then what was loaded must not be used.
        """
        if not any((self.folder / name).is_symlink() for name in model_file.files):
            with self._unchanged(model_file):
                yield self.path(model_file)
            return
        with tempfile.TemporaryDirectory(prefix="ccnet-") as folder:
            for name in model_file.files:
                _copy_link(self.folder / name, Path(folder) / name)
            with dataclasses.replace(self, folder=Path(folder))._unchanged(model_file):
                yield Path(folder) / model_file.files[0]

    @contextlib.contextmanager
    def _unchanged(self, model_file: ModelFile) -> Iterator[None]:
        def identities() -> list[tuple[int, ...] | None]:
            return [file_identity(p) if p.exists() else None for p in (self.folder / name for name in model_file.files)]

        before = identities()
        self.verify(model_file)
        yield
        for name, then, now in zip(model_file.files, before, identities(), strict=True):
            if then != now:
                raise BundleError(f"{self.folder / name}: changed while it was being loaded; load the bundle again")

    def verify_file(self, name: str) -> None:
        """Check one file of the bundle; raises BundleError as `verify`."""
        for record in self.manifest.files:
            if record.name == name:
                return _verify_file(self.folder, record)
        raise BundleError(f"{self.folder / self.manifest.FILE}: '{name}' has no file record")


@dataclass(frozen=True)
class Bundle(ModelFolder[Manifest]):
    """A bundle: the model files of a CCNet."""

    @property
    def spec(self) -> ModelSpec:
        return self.manifest.spec


def read_bundle(folder: str | Path) -> Bundle:
    """Read and check the manifest of a bundle. Raises BundleError for anything that is not a whole bundle."""
    return Bundle(Path(folder), read_manifest(folder, Manifest, "bundle", "ccnet export CHECKPOINT --out", SCHEMA))


def read_manifest(folder: str | Path, contents: type[AnyContents], kind: str, command: str, schema: int) -> AnyContents:
    """Read and check the manifest of a folder of model files, a `kind` that `command FOLDER` makes.

    Raises BundleError for anything that is not a whole one.
    """
    folder = Path(folder)
    path = folder / contents.FILE
    article = "an" if kind[0] in "aeiou" else "a"
    if folder.is_file():
        raise BundleError(f"{folder}: got a file, expected the folder of {article} {kind}, which has a {contents.FILE}")
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such {kind} folder; '{command} {folder}' makes one")
    if not path.is_file():
        below = sorted(str(inner.parent) for inner in folder.glob(f"*/{contents.FILE}"))
        raise BundleError(
            f"{folder}: has no {contents.FILE}, so it is not {article} {kind}, or its copy was not finished"
            + (f"; it holds {', '.join(below[:3])}" if below else "")
        )
    try:
        data = read_json(path, limit=_LARGEST_MANIFEST)
    except BadRecord as error:
        raise BundleError(f"{path}: {error}; copy the {kind} again") from None
    found = data.get("schema") if isinstance(data, dict) else None
    if found != schema:
        raise BundleError(f"{path}: got schema {show(found)}, this version reads {schema}; export the {kind} again")
    try:
        manifest = section_from_json(contents, data, where=contents.FILE)
    except ConfigError as error:
        raise BundleError(f"{folder}: {error}") from error
    _check_names(folder, manifest)
    return manifest


def _check_names(folder: Path, manifest: Contents) -> None:
    where = folder / manifest.FILE
    for kind, names in (
        ("model file", [model_file.name for model_file in manifest.model_files]),
        ("engine", [engine.name for engine in manifest.engines]),
    ):
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise BundleError(f"{where}: lists {kind} '{quote(twice[0])}' more than once; export the bundle again")
    model_files = {model_file.name for model_file in manifest.model_files}
    for engine in manifest.engines:
        if engine.model_file not in model_files:
            raise BundleError(
                f"{where}: engine '{quote(engine.name)}' names an unknown model file '{quote(engine.model_file)}'"
            )
    for name in [record.name for record in manifest.files] + [f for a in manifest.model_files for f in a.files]:
        if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
            raise BundleError(f"{where}: file name {show(name)} leaves the bundle folder")
        if len(name.encode()) > _LONGEST_NAME:
            raise BundleError(f"{where}: file name {show(name)} has {len(name)} characters, no file has such a name")
    for engine in manifest.engines:
        speed = engine.speed.get("ms_per_video", 1.0)
        if not is_number(speed) or speed <= 0:
            raise BundleError(
                f"{where}: engine '{quote(engine.name)}': speed: got {show(speed)}, expected milliseconds"
            )
    for model_file in manifest.model_files:
        if model_file.max_batch < 1:
            raise BundleError(
                f"{where}: model file '{quote(model_file.name)}': max_batch: got {model_file.max_batch}, "
                "expected 1 or more"
            )
        if not model_file.files:
            raise BundleError(f"{where}: model file '{quote(model_file.name)}' lists no files")


def _copy_link(source: Path, target: Path) -> None:
    try:
        with open_regular(source) as stream, open(target, "xb") as copy:  # a device has no end
            shutil.copyfileobj(stream, copy)
    except OSError as error:
        raise BundleError(
            f"{source}: is a link, and can't be copied to {target.parent} for loading ({error.strerror or error}); "
            "copy the bundle so that its files are no links (cp -rL)"
        ) from None


def _check_external(folder: Path, graph: ModelFile) -> None:
    """Raise BundleError where an ONNX file takes weights from a file that is not among the model file's own."""
    if graph.format != "onnx":
        return
    for name in sorted(external_files(folder / graph.files[0])):
        if name not in graph.files[1:]:
            raise BundleError(
                f"{folder / graph.files[0]}: takes weights from {show(name)}, expected a file of the bundle that "
                f"the manifest lists for '{quote(graph.name)}'; it was not loaded"
            )


def _verify_file(folder: Path, record: FileRecord) -> None:
    path = folder / record.name
    if not path.is_file():
        raise BundleError(f"{path}: missing; copy the bundle again")
    size = path.stat().st_size
    if size != record.size:
        raise BundleError(f"{path}: {size} bytes, the manifest says {record.size}; copy the bundle again")
    digest = sha256_file(path)
    if digest != record.sha256:
        raise BundleError(f"{path}: SHA-256 {digest[:16]}..., the manifest says {record.sha256[:16]}...; copy it again")
