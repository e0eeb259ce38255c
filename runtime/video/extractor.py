"""The extractor: a folder with the graphs that turn frames and sound into features, and what they consume and produce.

Its manifest `extractor.json` lists model files and engines as a bundle's does; an engine's name begins with that of its
graph. Nothing else defines the names and shapes of the graphs' tensors.

Shapes: B rows of a batch   H, W sides of a padded frame, multiples of 8   h, w = H / 8, W / 8   D encoding channels
        S side of the crop   F frames of a window
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from runtime.bundle import Contents, Engine, ModelFolder, read_manifest
from runtime.errors import BundleError
from runtime.schema import quote, require
from runtime.spec import FeatureLayout, GraphTensors, TimeBase
from runtime.video.logmel import BANDS, EXAMPLE

SCHEMA = 1
MANIFEST = "extractor.json"

GraphName = Literal["encode", "flow", "i3d_rgb", "i3d_flow", "vggish"]
GRAPHS: tuple[GraphName, ...] = get_args(GraphName)
"""`encode`: once a frame; `flow`: once a pair of frames; the others: once a step."""

BATCHES: Mapping[GraphName, int] = {"encode": 8, "flow": 8, "i3d_rgb": 1, "i3d_flow": 1, "vggish": 8}
"""Largest batch that a graph is given; a pair of frames of 16:9 needs 18 MB of correlation."""

SMALLEST_SIDE = 128
"""Of a padded frame; below it the coarsest correlation level has no neighbours to sample between."""


@dataclass(frozen=True, kw_only=True)
class ExtractorSpec:
    """Sizes of an extractor's networks and inputs; the defaults are those of UnAV-100's published features."""

    side: int = 256
    """Shorter side of a resized frame."""
    crop: int = 224
    """S: side of the square that the two streams see."""
    iterations: int = 20
    """Of the flow network."""
    encoding_dim: int = 256
    """D: channels of the flow network's encodings."""
    rgb_dim: int = 1024
    flow_dim: int = 1024
    audio_dim: int = 128
    time_base: TimeBase = field(default_factory=TimeBase)
    layout: FeatureLayout = field(default_factory=FeatureLayout)

    def __post_init__(self) -> None:
        require(self.side >= SMALLEST_SIDE and self.side % 8 == 0, "side", self.side, "a multiple of 8, 128 or more")
        require(32 <= self.crop <= self.side, "crop", self.crop, f"32 to side ({self.side})")
        require(1 <= self.iterations <= 100, "iterations", self.iterations, "1 to 100")
        require(self.time_base == TimeBase(), "time_base", self.time_base, "25 fps, windows of 24 frames every 8")
        good = len(self.layout.visual) == 2 and len(self.layout.audio) == 1
        require(good, "layout", self.layout, "suffixes of the rgb, flow and sound features")

    @property
    def window(self) -> int:
        """F: frames of a step."""
        return int(self.time_base.window_frames)

    @property
    def stride(self) -> int:
        """Frames between two steps."""
        return int(self.time_base.stride_frames)

    def cells(self, longer: float) -> int:
        """Return h or w of the longer side of a frame, `longer` times as long as the shorter one."""
        return -(-int(self.side * longer) // 8)

    def tensors(self, graph: GraphName) -> GraphTensors:
        """Return the inputs and outputs of a graph. Free: `batch`, and `rows`, `columns` = h, w."""
        encoding = ("batch", self.encoding_dim, "rows", "columns")
        if graph == "encode":
            # pictures 0 to 255, rgb; the context is of the first frame of a pair
            frames = ("batch", 3, "8*rows", "8*columns")
            return GraphTensors({"frames": frames}, {"features": encoding, "context": encoding})
        if graph == "flow":
            levels = ("batch", 2, self.crop, self.crop)
            inputs = {"features": encoding, "following": encoding, "context": encoding}
            return GraphTensors(inputs, {"levels": levels})
        if graph == "vggish":
            return GraphTensors({"examples": ("batch", EXAMPLE, BANDS)}, {"sound": ("batch", self.audio_dim)})
        channels, width = (3, self.rgb_dim) if graph == "i3d_rgb" else (2, self.flow_dim)
        stacks = ("batch", self.window, channels, self.crop, self.crop)
        return GraphTensors({"stacks": stacks}, {"seen": ("batch", width)})


@dataclass(frozen=True, kw_only=True)
class ExtractorManifest(Contents):
    """Content of `extractor.json`."""

    FILE: ClassVar[str] = MANIFEST

    spec: ExtractorSpec
    weights: dict[str, str]
    """SHA-256 of the weight file of each network: `i3d_rgb`, `i3d_flow`, `raft`, `vggish`."""


@dataclass(frozen=True)
class Extractor(ModelFolder[ExtractorManifest]):
    """An extractor folder whose manifest has been read."""

    @property
    def spec(self) -> ExtractorSpec:
        return self.manifest.spec

    def engines(self, graph: GraphName) -> tuple[Engine, ...]:
        """Return the ways to run a graph, verified ones first."""
        return tuple(engine for engine in self.manifest.engines if graph_of(engine.name) == graph)

    def of_graph(self, graph: GraphName) -> Extractor:
        """Return the extractor with the engines of one graph alone, to choose among them."""
        return Extractor(self.folder, dataclasses.replace(self.manifest, engines=self.engines(graph)))

    def identity(self) -> dict[str, Any]:
        """Return what decides about the features, weights and sizes, as the manifest's JSON has it."""
        manifest = self.manifest.to_json()
        return {key: manifest[key] for key in ("weights", "spec")}


def graph_of(name: str) -> GraphName:
    """Return the graph of an engine or model file of this name. Raises BundleError where it names none."""
    for graph in GRAPHS:
        if name.startswith(f"{graph}-"):
            return graph
    raise BundleError(f"'{quote(name, 60)}' does not begin with a graph of an extractor: {', '.join(GRAPHS)}")


def is_extractor(folder: str | Path) -> bool:
    """Return whether a folder has the manifest of an extractor."""
    return (Path(folder) / MANIFEST).is_file()


def read_extractor(folder: str | Path) -> Extractor:
    """Read and check the manifest of an extractor. Raises BundleError for anything that is not a whole one."""
    command = "ccnet import-extractor --i3d-rgb F --i3d-flow F --raft F --vggish F --out"
    return Extractor(Path(folder), read_manifest(folder, ExtractorManifest, "extractor", command, SCHEMA))
