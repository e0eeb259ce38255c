"""Every setting of the project, as frozen keyword-only dataclasses, with the presets of the paper.

Any field can be overridden from the command line as `--section.field value` and from a file (`ccnet.settings`); an
unknown key is answered with the nearest known one. `ccnet presets` prints the docstrings of the fields; what follows
`Paper:` or `Release:` in one is where the setting comes from. Settings that a deployed network needs (time base,
layout, post-processing) are defined in `runtime.spec` and only gathered here.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from runtime.errors import ConfigError
from runtime.records import BadRecord, parse_json
from runtime.schema import convert, quote, require, section_from_json
from runtime.spec import WIDEST, FeatureLayout, ModelSpec, PostProcessing, TimeBase, check_length

MtgcOrder = Literal["c2f_f2c", "f2c_c2f"]
IouLoss = Literal["giou", "diou"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network; the defaults are the paper's UnAV-100 model.

    DAVEL, the baseline (CVPR 2023), is this network without gates, C2F, F2C and the channel branch of TDM.
    """

    length: int = 224
    """T: number of time steps. Paper: implementation details."""
    visual_dim: int = 2048
    """Visual feature width (I3D RGB 1024 + optical flow 1024). Paper: implementation details."""
    audio_dim: int = 128
    """Audio feature width (VGGish). Paper: implementation details."""
    dim: int = 512
    """D: width of the embeddings and of CMCC. Paper: implementation details."""
    heads: int = 4
    """Attention heads in embedding, CMCC and C2F blocks. Release: configuration."""
    levels: int = 6
    """Pyramid levels (temporal scales), which are the layers of CMCC. Paper: CMCC, L_c."""
    self_layers: int = 2
    """Self-attention Blocks per modality after the embedding. Paper: CMCC, L_s."""
    num_classes: int = 100
    """C: number of classes, as many as the annotation file has. Paper: 100 of UnAV-100."""
    head_dim: int = 512
    """Width of the hidden layers of the class and offset heads. Release: configuration."""
    tdm_dim: int = 128
    """H: hidden width per class in the temporal dependency module. Release: configuration."""
    cmi: bool = True
    """Cross-modal interaction. Off: each modality's Block attends to itself. Paper: Eq. 2, Table 3."""
    tcg: bool = True
    """Temporal consistency gates. Off: no gating. Paper: Eq. 5 and 6, Table 3."""
    c2f: bool = True
    """Coarse-to-fine collaboration. Paper: Eq. 8, Table 2."""
    f2c: bool = True
    """Fine-to-coarse collaboration. Paper: Eq. 9, Table 2."""
    mtgc_order: MtgcOrder = "c2f_f2c"
    """Order of the two directions. Paper: Table 4."""
    tdm_channel_branch: bool = True
    """The channel branch of TDM, which the paper's text does not have. Release: weights."""
    drop_path: float = 0.1
    """Stochastic-depth rate in training. Release: configuration."""

    def __post_init__(self) -> None:
        check_length(self.length, self.levels)
        for name in ("visual_dim", "audio_dim", "dim", "heads", "num_classes", "head_dim", "tdm_dim"):
            value = getattr(self, name)
            require(1 <= value <= WIDEST, f"model.{name}", value, f"an integer >= 1, at most {WIDEST}")
        require(0 <= self.self_layers <= 64, "model.self_layers", self.self_layers, "an integer from 0 to 64")
        require(self.dim % self.heads == 0, "model.dim", self.dim, f"a multiple of model.heads ({self.heads})")
        require(0 <= self.drop_path < 1, "model.drop_path", self.drop_path, "a number in [0, 1)")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> ModelConfig:
        """Read what `to_json` wrote. Raises ConfigError for unknown or mistyped keys."""
        return section_from_json(cls, data, where="model")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The training objective: focal loss on the classes, IoU loss on the offsets."""

    iou: IouLoss = "giou"
    """Offset loss: generalised IoU (the paper), or distance IoU (the released programs of CCNet and DAVEL).
    Paper: training."""
    offset_weight: float = 1.0
    """Weight of the offset loss. Paper: training."""
    focal_alpha: float = 0.25
    """Focal loss: weight of positives. Paper: training."""
    focal_gamma: float = 2.0
    """Focal loss: how much easy points count less. Paper: training."""
    normalizer: float = 250.0
    """Initial value of the running number of positive points. Release: configuration."""
    normalizer_momentum: float = 0.9
    """Momentum of that number. Release: configuration."""

    def __post_init__(self) -> None:
        require(0 <= self.focal_alpha <= 1, "loss.focal_alpha", self.focal_alpha, "a number in [0, 1]")
        for name in ("offset_weight", "focal_gamma"):
            require(0 <= getattr(self, name) <= 1e6, f"loss.{name}", getattr(self, name), "a number from 0 to 1e6")
        require(self.normalizer > 0, "loss.normalizer", self.normalizer, "a number above 0")
        good = 0 <= self.normalizer_momentum < 1
        require(good, "loss.normalizer_momentum", self.normalizer_momentum, "a number in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation; the defaults are those of the paper's section 4."""

    batch_size: int = 16
    """Videos of a step. Paper: implementation details."""
    epochs: int = 40
    """Epochs after warm-up. Paper: implementation details."""
    warmup_epochs: int = 5
    """Epochs in which the learning rate rises from zero. Paper: implementation details."""
    learning_rate: float = 1e-4
    """Highest learning rate of Adam. Paper: implementation details."""
    min_learning_rate: float = 1e-8
    """Where the cosine schedule ends. Release: configuration."""
    weight_decay: float = 1e-4
    """Not applied to norms, biases and scales. Release: configuration."""
    clip_norm: float = 1.0
    """Largest gradient norm. Release: configuration."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones evaluated and exported. Release: configuration."""
    crop_min: float = 0.9
    """Shortest random temporal crop, as a share of the length. Release: configuration."""
    crop_max: float = 1.0
    """Longest random temporal crop, as a share of the length. Release: configuration."""
    crop_keep: float = 0.5
    """An event stays in a crop when at least this share of it remains. Release: configuration."""
    seed: int = 0
    """Of the initial weights, the order of videos, crops and stochastic depth."""
    workers: int = 1
    """Data loading processes; 0 loads in the training process."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision on a GPU; a CPU trains in fp32 or bf16."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:N`."""
    compile: bool = False
    """Run the network through torch.compile: worth its minutes of compilation in a long run on a GPU."""
    validate_every: int = 1
    """Epochs between validations."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "validate_every"):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "an integer >= 1")
        require(self.warmup_epochs >= 0, "train.warmup_epochs", self.warmup_epochs, "an integer >= 0")
        require(0 <= self.workers <= 1024, "train.workers", self.workers, "an integer from 0 to 1024")
        require(0 <= self.seed < 1 << 63, "train.seed", self.seed, "an integer from 0 to 2^63 - 1")
        require(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "a number above 0")
        good = 0 <= self.min_learning_rate <= self.learning_rate
        expected = f"a number from 0 to train.learning_rate ({self.learning_rate})"
        require(good, "train.min_learning_rate", self.min_learning_rate, expected)
        require(0 <= self.weight_decay <= 1, "train.weight_decay", self.weight_decay, "a number from 0 to 1")
        expected = "a number above 0; a large one, such as 1e9, clips nothing"
        require(self.clip_norm > 0, "train.clip_norm", self.clip_norm, expected)
        require(0 <= self.ema < 1, "train.ema", self.ema, "a number in [0, 1)")
        require(
            0 < self.crop_min <= self.crop_max <= 1, "train.crop_min", self.crop_min, "0 < crop_min <= crop_max <= 1"
        )
        require(0 < self.crop_keep <= 1, "train.crop_keep", self.crop_keep, "a number in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All sections. `--section.field value` overrides any field."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    time_base: TimeBase = field(default_factory=TimeBase)
    layout: FeatureLayout = field(default_factory=FeatureLayout)
    post: PostProcessing = field(default_factory=PostProcessing)

    def spec(self, labels: tuple[str, ...]) -> ModelSpec:
        """Return the inputs and outputs of a network of this configuration that is trained on `labels`.

        Raises ConfigError when there are not `model.num_classes` labels.
        """
        if len(labels) != self.model.num_classes:
            raise ConfigError(
                f"labels: got {len(labels)}, expected model.num_classes = {self.model.num_classes}; "
                f"--model.num_classes {len(labels)} is for these annotations"
            )
        return ModelSpec(
            length=self.model.length,
            levels=self.model.levels,
            visual_dim=self.model.visual_dim,
            audio_dim=self.model.audio_dim,
            labels=labels,
            time_base=self.time_base,
            layout=self.layout,
            post=self.post,
        )

    def to_json(self) -> dict[str, Any]:
        return cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(self))))

    @classmethod
    def from_json(cls, data: Any) -> Config:
        """Read what `to_json` wrote. Raises ConfigError for unknown or mistyped keys."""
        return section_from_json(cls, data, where="config")


_UNAV100 = Config()
_ONEPEACE = Config(
    model=ModelConfig(length=256, visual_dim=1536, audio_dim=1536),
    time_base=TimeBase(fps=16.0, stride_frames=4.0, window_frames=16.0),
    layout=FeatureLayout(visual=("_one_peace_video_finetune",), audio=("_one_peace_audio",)),
)


def _davel(config: Config) -> Config:
    """Return DAVEL, the baseline of the paper, for the features of a CCNet; its release trains with distance IoU."""
    model = dataclasses.replace(config.model, tcg=False, c2f=False, f2c=False, tdm_channel_branch=False)
    return dataclasses.replace(config, model=model, loss=LossConfig(iou="diou"))


PRESETS: Mapping[str, Config] = {
    "unav100": _UNAV100,
    "unav100_onepeace": _ONEPEACE,
    "davel_unav100": _davel(_UNAV100),
    "davel_unav100_onepeace": _davel(_ONEPEACE),
    # A network that learns synthetic features in minutes on two cores: a step every 0.64 s, so that T = 96 holds 60 s.
    "demo": Config(
        model=ModelConfig(
            length=96,
            visual_dim=48,
            audio_dim=16,
            dim=48,
            heads=4,
            levels=5,
            num_classes=5,
            head_dim=48,
            tdm_dim=16,
            self_layers=1,
            drop_path=0.0,
        ),
        train=TrainConfig(epochs=7, warmup_epochs=1, learning_rate=5e-3, ema=0.98, validate_every=4),
        time_base=TimeBase(stride_frames=16.0, window_frames=32.0),
    ),
}


def preset(name: str) -> Config:
    """Return a preset by name. Raises ConfigError listing the known ones."""
    if name not in PRESETS:
        raise ConfigError(f"preset: got {name!r}, expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def with_overrides(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Apply `{"section.field": value}`, where a value may be text as on the command line; `-` in a key stands for `_`.

    Raises ConfigError for an unknown key or a value of the wrong type.
    """
    sections = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    changes: dict[str, dict[str, Any]] = {}
    for given, value in overrides.items():
        key = given.replace("-", "_")
        section, _, name = key.partition(".")
        known = [f.name for f in dataclasses.fields(sections[section])] if section in sections else []
        if name not in known:
            raise ConfigError(f"unknown configuration key '{quote(given, 80)}'; {_known_keys(key, sections, known)}")
        hint = get_type_hints(type(sections[section]))[name]
        if name in changes.setdefault(section, {}):
            raise ConfigError(f"{key}: given twice, with a hyphen and with an underscore")
        parsed = _parse(value, hint, where=key) if isinstance(value, str) else convert(value, hint, where=key)
        changes[section][name] = parsed
    updated = {name: dataclasses.replace(sections[name], **values) for name, values in changes.items()}
    return dataclasses.replace(config, **updated)


def parse_overrides(arguments: list[str]) -> dict[str, str]:
    """Parse `["--model.length", "96", "--train.epochs=3"]` into `{"model.length": "96", "train.epochs": "3"}`."""
    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        item = rest.pop(0)
        key, equals, value = item.removeprefix("--").partition("=")
        if not item.startswith("--") or "." not in key:
            nearest = nearest_key(key) if item.startswith("--") else None
            hint = f"did you mean --{nearest}?" if nearest else "settings are given as --section.field value"
            raise ConfigError(f"unknown argument '{item}'; {hint}")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{item}: a value is missing; settings are given as --section.field value")
            value = rest.pop(0)
        overrides[key.replace("-", "_")] = value
    return overrides


def all_keys() -> list[str]:
    """Return every `section.field`."""
    sections = {f.name: getattr(Config(), f.name) for f in dataclasses.fields(Config)}
    return [f"{section}.{f.name}" for section, value in sections.items() for f in dataclasses.fields(value)]


def nearest_key(key: str) -> str | None:
    """Return the known key that one may have been meant as: the same field of another section, or a near spelling."""
    key, known = key.replace("-", "_"), all_keys()
    field_name = key.rpartition(".")[2]
    same_field = [name for name in known if name.partition(".")[2] == field_name]
    near = difflib.get_close_matches(key, known, 1)
    near_field = difflib.get_close_matches(field_name, [name.partition(".")[2] for name in known], 1)
    found = [*same_field, *near, *(name for name in known if name.partition(".")[2] in near_field)]
    return found[0] if found else None


def _known_keys(key: str, sections: Mapping[str, Any], known: list[str]) -> str:
    section, nearest = key.partition(".")[0], nearest_key(key)
    meant = f"did you mean {nearest}? " if nearest else ""
    if known:
        return meant + "known keys: " + ", ".join(f"{section}.{name}" for name in known)
    return meant + "known sections: " + ", ".join(sections)


def _parse(text: str, hint: Any, *, where: str) -> Any:
    """Return command line text as the annotated type; `runtime.schema.convert` checks it."""
    if get_origin(hint) is tuple:
        return convert(text.split(","), hint, where=where)
    if hint is str or (get_origin(hint) is Literal and all(isinstance(a, str) for a in get_args(hint))):
        return convert(text, hint, where=where)
    try:
        value = float(text) if hint is float else parse_json(text)  # `.5` and `1.` are numbers, too
    except (BadRecord, ValueError):
        lowered = text.lower()
        value = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}.get(lowered, text)
    return convert(value, hint, where=where)
