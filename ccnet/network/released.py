"""Names of the authors' released checkpoints, mapped strictly onto this network.

A released file is a pickled dict: `epoch`, `state_dict`, `state_dict_ema`, `optimizer`, `scheduler`; parameter names
start with `module.`; 1x1 convolutions are stored as [out, in, 1], norms and scales as [1, C, 1].
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ccnet.config import ModelConfig
from ccnet.network.model import CCNet
from runtime.errors import CheckpointError
from runtime.schema import quote

PREFIX = "module."
EMA, RAW = "state_dict_ema", "state_dict"

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
        # Mapped, so that the optimizer's state is never read.
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        reason = quote(str(error).splitlines()[0])
        raise CheckpointError(
            f"{path}: refused, the file is not a checkpoint or holds objects other than tensors and plain containers "
            f"({reason}); save its state dict alone with torch.save"
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
    """Copy released parameters (names without `module.`) into `model`.

    Raises CheckpointError that lists every unknown, missing or misshapen name; the model is then unchanged.
    """
    own = model.state_dict()
    names = {released_name(name, model.config): name for name in own}
    shapes = {name: _released_shape(ours, own[ours]) for name, ours in names.items()}
    problems = [f"unknown: {name} {list(value.shape)}" for name, value in parameters.items() if name not in names]
    problems += [f"missing: {name} {shape}" for name, shape in shapes.items() if name not in parameters]
    for name in names.keys() & parameters.keys():
        value = parameters[name]
        if list(value.shape) != shapes[name] or not value.is_floating_point():
            got = f"{value.dtype} {list(value.shape)}".removeprefix("torch.")
            problems.append(f"misshapen: {name} is {got}, expected float {shapes[name]}")
    if problems:
        raise CheckpointError(
            f"{source}: {len(problems)} of its names do not fit this configuration (another preset or other "
            "--model settings?):\n  " + "\n  ".join(sorted(problems))
        )
    model.load_state_dict({ours: parameters[name].reshape(own[ours].shape) for name, ours in names.items()})


def released_name(name: str, config: ModelConfig) -> str:
    """Return the released name of one of our parameters, without `module.`."""
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
