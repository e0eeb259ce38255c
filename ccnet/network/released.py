"""Names of the released checkpoints of CCNet and of DAVEL, the baseline, mapped strictly onto this network.

A released file is a pickled dict: `epoch`, `state_dict`, `state_dict_ema`, `optimizer`, `scheduler`; parameter names
start with `module.`; 1x1 convolutions are stored as [out, in, 1], norms and scales as [1, C, 1]. Both programs share
their names but for five modules.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ccnet.config import ModelConfig
from ccnet.network.model import CCNet
from runtime.errors import CheckpointError
from runtime.files import open_regular
from runtime.schema import quote

PREFIX = "module."
EMA, RAW = "state_dict_ema", "state_dict"
_LISTED = 8
"""Misfits of each kind that a message names."""

Release = Literal["CCNet", "DAVEL"]

# Modules of CCNet's release -> of DAVEL's.
_DAVEL = {
    "backbone.ori_CMI_Visual.": "backbone.ori_cross_att_Va.",
    "backbone.ori_CMI_Audio.": "backbone.ori_cross_att_Av.",
    "backbone.CMI_Visual.": "backbone.cross_att_Va.",
    "backbone.CMI_Audio.": "backbone.cross_att_Av.",
    "MTGC_block.": "dependency_block.",
}

_PARTS_OF_CCNET = {"tcg", "c2f", "f2c", "tdm_channel_branch"}
"""Settings of what DAVEL does not have."""

# Parts of a Block or a gate: ours -> released.
_PARTS = {
    "norm_kv.": "ln11.",
    "norm_q.": "ln12.",
    "norm_mlp.": "ln2.",
    "attention.": "attn.",
    "query_conv.": "query_conv.conv.",
    "key_conv.": "key_conv.conv.",
    "value_conv.": "value_conv.conv.",
    "attention_scale.": "drop_path_attn.",
    "mlp_scale.": "drop_path_mlp.",
    "mlp.2.": "mlp.3.",
}


def read_released(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the parameters of a released file, names without `module.`: the averaged (EMA) weights where it has them.

    Also takes a file that holds a bare state dict. Nothing but tensors and plain containers is unpickled.
    Raises CheckpointError when the file is missing, damaged, of another structure, or holds other objects.
    """
    try:
        with open_regular(path) as stream:
            packed = zipfile.is_zipfile(stream)
        # Mapped, so that the optimizer's state is never read.
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror or quote(error)})") from None
    except pickle.UnpicklingError as error:  # whose text advises to load it unsafely
        raise CheckpointError(
            f"{path}: refused, the file is not a checkpoint or holds objects other than tensors and plain containers; "
            "save its state dict alone with torch.save"
        ) from error
    except Exception as error:  # a damaged file makes torch.load fail in any way, with an AssertionError too
        reason = f"{type(error).__name__}: {quote(error)}"
        raise CheckpointError(f"{path}: can't be read as a PyTorch file, is it truncated? ({reason})") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: got a {type(content).__name__}, expected a dict of parameters")
    nested = [key for key in (EMA, RAW) if isinstance(content.get(key), Mapping)]
    parameters: Mapping[Any, Any] = content[nested[0]] if nested else content
    wrong = [str(name) for name, value in parameters.items() if not isinstance(value, Tensor)]
    if wrong or not parameters:
        keys = quote(", ".join(map(str, list(content)[:8])))
        raise CheckpointError(
            f"{path}: expected '{EMA}', '{RAW}' or a dict of tensors; got a dict with the keys {keys}"
            + (f", where {quote(wrong[0])} is not a tensor" if wrong else "")
        )
    return {str(name).removeprefix(PREFIX): value for name, value in parameters.items()}


def load_released(model: CCNet, parameters: Mapping[str, Tensor], *, source: str = "checkpoint") -> None:
    """Copy released parameters (names without `module.`, of either release) into `model`.

    Raises CheckpointError that lists unknown, missing and misshapen names; the model is then unchanged.
    """
    own = model.state_dict()
    release = release_of(parameters)
    names = {released_name(name, model.config, release): name for name in own}
    shapes = {name: _released_shape(ours, own[ours]) for name, ours in names.items()}
    problems = [f"unknown: {name} {list(value.shape)}" for name, value in parameters.items() if name not in names]
    problems += [f"missing: {name} {shape}" for name, shape in shapes.items() if name not in parameters]
    for name in names.keys() & parameters.keys():
        value = parameters[name]
        if list(value.shape) != shapes[name] or not value.is_floating_point():
            got = f"{value.dtype} {list(value.shape)}".removeprefix("torch.")
            problems.append(f"misshapen: {name} is {got}, expected float {shapes[name]}")
    if problems:
        listed = []
        for kind in ("misshapen", "missing", "unknown"):
            lines = sorted(problem for problem in problems if problem.startswith(kind))
            listed += lines[:_LISTED]
            listed += [f"and {len(lines) - _LISTED} more {kind}"] if len(lines) > _LISTED else []
        raise CheckpointError(
            f"{source}: {len(problems)} of its names do not fit this configuration (another preset or other "
            "--model settings?):\n  " + "\n  ".join(listed)
        )
    model.load_state_dict({ours: parameters[name].reshape(own[ours].shape) for name, ours in names.items()})


def release_of(parameters: Mapping[str, Any]) -> Release:
    """Return whose release has these names; CCNet's where nothing says DAVEL."""
    davel = tuple(_DAVEL.values())
    return "DAVEL" if any(name.startswith(davel) for name in parameters) else "CCNet"


def released_settings(parameters: Mapping[str, Tensor]) -> dict[str, int | bool]:
    """Return what names and shapes of a released file say about its network, as fields of `ModelConfig`.

    `heads`, `cmi` and `mtgc_order` leave no trace; T does in time-axis weights only, which DAVEL does not have.
    """
    block = "dependency_block" if release_of(parameters) == "DAVEL" else "MTGC_block"

    def size(name: str, axis: int) -> int | None:
        value = parameters.get(name)
        return value.shape[axis] if value is not None and value.ndim > axis else None

    def numbered(prefix: str) -> int:
        numbers = {n.removeprefix(prefix).partition(".")[0] for n in parameters if n.startswith(prefix)}
        return len(numbers)

    classes, wide = size("cls_head.cls_head.conv.weight", 0), size(f"{block}.feature_expand.conv.weight", 0)
    sizes = {
        "length": size(f"{block}.C2F_linear.0.weight", 0) or size(f"{block}.feature_tem_block.0.weight", 1),
        "visual_dim": size("backbone.embd_V.0.conv.weight", 1),
        "audio_dim": size("backbone.embd_A.0.conv.weight", 1),
        "dim": size("backbone.embd_V.0.conv.weight", 0),
        "levels": numbered("reg_head.scale.") or None,
        "self_layers": numbered("backbone.self_att_V."),
        "num_classes": classes,
        "head_dim": size("cls_head.head.0.conv.weight", 0),
        "tdm_dim": wide // classes if wide and classes else None,
    }
    parts = {
        "tcg": "backbone.audio_TCG.",
        "c2f": f"{block}.C2F_",
        "f2c": f"{block}.F2C_",
        "tdm_channel_branch": f"{block}.feature_tem_",
    }
    present = {name: any(n.startswith(prefix) for n in parameters) for name, prefix in parts.items()}
    return {name: value for name, value in sizes.items() if value is not None} | present


def explain_misfit(parameters: Mapping[str, Tensor], given: str, presets: Mapping[str, ModelConfig]) -> str | None:
    """Say which preset a released file is for, where it is not for the one `given`.

    None where it is, or where the file is no release at all. `presets`: each with the settings applied that were given
    beside the preset.
    """
    found = released_settings(parameters)
    differing = {
        name: [key for key, value in found.items() if getattr(model, key) != value] for name, model in presets.items()
    }
    if not differing[given] or not {"visual_dim", "audio_dim", "num_classes"} <= found.keys():
        return None

    def distance(name: str) -> tuple[int, int, bool, int]:
        """Sort by release, then features (which settle time base and files), then what was asked for."""
        keys = set(differing[name])
        return len(keys & _PARTS_OF_CCNET), len(keys & {"visual_dim", "audio_dim"}), name != given, len(keys)

    best = min(differing, key=distance)
    settings = "".join(f" --model.{key} {_text(found[key])}" for key in differing[best])
    mismatch = ", ".join(
        f"model.{key} is {_text(found[key])} there and {_text(getattr(presets[given], key))} here"
        for key in differing[given]
    )
    return (
        f"{release_of(parameters)}'s release for visual features of {found['visual_dim']} and audio features of "
        f"{found['audio_dim']} channels, not what preset {given} describes: {mismatch}. "
        f"Use --preset {best}{settings}" + ("" if settings else ", other settings as they are")
    )


def _text(value: int | bool) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def released_name(name: str, config: ModelConfig, release: Release = "CCNet") -> str:
    """Return the name that a release gives one of our parameters, without `module.`."""
    ccnet = _ccnet_name(name, config)
    if release == "DAVEL":
        for prefix, davel in _DAVEL.items():
            if ccnet.startswith(prefix):
                return davel + ccnet.removeprefix(prefix)
    return ccnet


def _ccnet_name(name: str, config: ModelConfig) -> str:
    modules = _modules(config)
    prefix = next(prefix for prefix in modules if f"{name}.".startswith(f"{prefix}."))
    rest = name[len(prefix) + 1 :]
    if prefix.endswith("_gate"):  # a gate holds its attention flat
        rest = rest.removeprefix("attention.")
        rest = f"gate_linear.conv.{rest.removeprefix('linear.')}" if rest.startswith("linear.") else rest
    for ours, theirs in _PARTS.items():
        head, found, tail = rest.partition(ours)
        if found and (head == "" or head.endswith(".")):
            rest = head + theirs + tail
    return ".".join(part for part in (modules[prefix], rest) if part)


def _modules(config: ModelConfig) -> dict[str, str]:
    """Map our modules to released ones; sub-modules of a Block, gate or norm follow `_PARTS`."""
    table: dict[str, str] = {}
    for modality, letter, word in (("visual", "V", "Visual"), ("audio", "A", "Audio")):
        for i in range(2):
            table[f"embed_{modality}.convs.{i}"] = f"backbone.embd_{letter}.{i}.conv"
        table[f"embed_{modality}.norms"] = f"backbone.embd_norm_{letter}"
        table[f"embed_{modality}.blocks"] = f"backbone.self_att_{letter}"
        for level in range(config.levels):
            block = f"ori_CMI_{word}" if level == 0 else f"CMI_{word}.{level - 1}"
            table[f"cmcc.layers.{level}.{modality}_block"] = f"backbone.{block}"
            table[f"cmcc.layers.{level}.{modality}_gate"] = f"backbone.{modality}_TCG.{level}"
    for ours, theirs in {
        "c2f.linears": "C2F_linear",
        "c2f.block": "C2F_attention",
        "f2c.blocks": "F2C_attention_block",
        "tdm.expand": "feature_expand.conv",
        "tdm.squeeze": "feature_squeeze.conv",
        "tdm.temporal": "temporal_branch",
        "tdm.cooccurrence": "cooccur_branch",
        "tdm.press": "feature_tem_press.conv",
        "tdm.channel_blocks": "channel_att",
        "tdm.channel_linears": "feature_tem_block",
    }.items():
        table[f"mtgc.stages.{ours}"] = f"MTGC_block.{theirs}"
    for ours, theirs, output in (("class_head", "cls_head", "cls_head"), ("offset_head", "reg_head", "offset_head")):
        for i in range(2):
            table[f"{ours}.convs.{i}"] = f"{theirs}.head.{i}.conv"
        table[f"{ours}.norms"] = f"{theirs}.norm"
        table[f"{ours}.output"] = f"{theirs}.{output}.conv"
    table.update({f"offset_head.scales.{level}": f"reg_head.scale.{level}.scale" for level in range(config.levels)})
    return table


def _released_shape(name: str, value: Tensor) -> list[int]:
    """Return the shape in which a released file holds one of our parameters."""
    shape = list(value.shape)
    if len(shape) == 2 and ".linears." not in name and ".channel_linears." not in name:
        return [*shape, 1]  # linear layers over the channels are 1x1 convolutions there
    if len(shape) == 1 and ("norm" in name or name.endswith(".scale")):
        return [1, *shape, 1]
    return shape
