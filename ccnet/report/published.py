"""What the paper's tables say, and which of their rows a network of ours stands beside.

The numbers are those of the paper's Table 1 (UnAV-100, test subset, mAP in percent). Of Tables 2 to 4 only the layout
is here: which parts of the network each row switches off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from ccnet.config import PRESETS, ModelConfig

COLUMNS = ("0.5", "0.6", "0.7", "0.8", "0.9", "Avg.")
"""tIoU thresholds, and the average over 0.1:0.1:0.9."""
TEST_VIDEOS, CLASSES = 2167, 100
"""Of UnAV-100's test subset."""


@dataclass(frozen=True)
class Published:
    """A row of Table 1."""

    name: str
    scores: tuple[float, ...]
    """mAP in percent, as `COLUMNS`."""


TABLE_1 = (
    Published("VSGN", (24.5, 20.2, 15.9, 11.4, 6.8, 24.1)),
    Published("TadTR", (30.4, 27.1, 23.3, 19.4, 14.3, 29.4)),
    Published("ActionFormer", (43.5, 39.4, 33.4, 27.3, 17.9, 42.2)),
    Published("DAVEL", (50.6, 45.8, 39.8, 32.4, 21.1, 47.8)),
    Published("CCNet", (51.9, 47.2, 41.5, 34.1, 23.0, 49.2)),
    Published("CCNet, ONE-PEACE", (57.3, 52.2, 46.2, 38.1, 25.6, 54.1)),
)
_OF_PRESET = {"unav100": "CCNet", "unav100_onepeace": "CCNet, ONE-PEACE", "davel_unav100": "DAVEL"}


@dataclass(frozen=True)
class SwitchTable:
    """One of Tables 2 to 4: rows of the paper's network that differ in some settings."""

    number: int
    title: str
    settings: tuple[str, ...]
    """Fields of `ModelConfig` that its columns show."""
    rows: tuple[tuple[bool | str, ...], ...]
    """Values of `settings`, the paper's network last."""

    def row_of(self, model: ModelConfig) -> int | None:
        """Return the row that a network stands in, or None: all its other parts have to be the paper's."""
        paper = ModelConfig()
        others = {"cmi", "tcg", "c2f", "f2c", "mtgc_order", "tdm_channel_branch"} - set(self.settings)
        if any(getattr(model, name) != getattr(paper, name) for name in others):
            return None
        values = tuple(getattr(model, name) for name in self.settings)
        return self.rows.index(values) if values in self.rows else None


_ON_OFF = ((False, False), (True, False), (False, True), (True, True))
SWITCH_TABLES = (
    SwitchTable(2, "the two directions of MTGC", ("c2f", "f2c"), _ON_OFF),
    SwitchTable(3, "the two parts of CMCC", ("cmi", "tcg"), _ON_OFF),
    SwitchTable(4, "the order of MTGC's directions", ("mtgc_order",), (("f2c_c2f",), ("c2f_f2c",))),
)


def published_named(name: str) -> Published | None:
    """Return the row of Table 1 of this name, in upper or lower case."""
    return next((row for row in TABLE_1 if row.name.lower() == name.lower()), None)


def published_of(model: ModelConfig) -> Published | None:
    """Return the row of Table 1 of networks of this kind on features of this width, whatever their other sizes."""
    kind = ("visual_dim", "audio_dim", "cmi", "tcg", "c2f", "f2c", "mtgc_order", "tdm_channel_branch", "num_classes")
    for preset, name in _OF_PRESET.items():
        if all(getattr(model, key) == getattr(PRESETS[preset].model, key) for key in kind):
            return published_named(name)
    return None


def describe(model: ModelConfig) -> str:
    """Return what a network is: CCNet, DAVEL, or the parts that are off."""
    switches: Mapping[str, bool | str] = {
        name: getattr(model, name) for name in ("cmi", "tcg", "c2f", "f2c", "mtgc_order", "tdm_channel_branch")
    }
    plain = {f.name: f.default for f in dataclasses.fields(ModelConfig) if f.name in switches}
    davel = {name: getattr(PRESETS["davel_unav100"].model, name) for name in switches}
    if switches == plain:
        return "CCNet"
    if switches == davel:
        return "DAVEL"
    changed = [
        f"{name} {value if isinstance(value, str) else 'off'}"
        for name, value in switches.items()
        if value != plain[name]
    ]
    return f"CCNet with {', '.join(changed)}"
