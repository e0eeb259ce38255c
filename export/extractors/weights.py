"""Reading the public weight files: unpickled as plain tensors only, renamed where another port has other names, and
taken only when every name and shape fits.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from export.extractors.i3d import I3D
from export.extractors.raft import RAFT
from export.extractors.vggish import Vggish
from runtime.errors import CheckpointError
from runtime.schema import quote, show

Network = TypeVar("Network", bound=nn.Module)
_COUNTER = ".num_batches_tracked"
_LISTED = 8


def load_i3d(path: str | Path, channels: int) -> I3D:
    """Read `i3d_rgb.pt` (3 channels) or `i3d_flow.pt` (2), also piergiaj's `rgb_imagenet.pt` and `flow_imagenet.pt`.

    Raises CheckpointError for a file that is missing, no file of tensors, or another network's.
    """
    return _load(I3D(channels), path, rename_piergiaj)


def load_raft(path: str | Path) -> RAFT:
    """Read `raft-sintel.pth`, or torchvision's `raft_large_C_T_SKHT_V1`; raises as `load_i3d`."""
    return _load(RAFT(), path, rename_raft)


def load_vggish(path: str | Path) -> Vggish:
    """Read `vggish-10086976.pth`; raises as `load_i3d`."""
    return _load(Vggish(), path, dict)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a file that `torch.save` wrote of a dictionary of tensors. Nothing else in it is ever run.

    Raises CheckpointError naming what is wrong with the file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weight file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001  whatever a damaged or hostile file makes the reader raise
        # PyTorch's own text advises to load it unsafely.
        reason = "" if isinstance(error, pickle.UnpicklingError) else f" ({quote(error, 160)})"
        raise CheckpointError(
            f"{path}: not a file of plain tensors as torch.save writes them{reason}; download it again"
        ) from None
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds {show(type(content).__name__)}, expected a dictionary of tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {show(name)} is {type(tensor).__name__}, expected names of tensors")
        if not name.endswith(_COUNTER) and (not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all())):
            raise CheckpointError(f"{path}: '{quote(name, 60)}' ({tensor.dtype}) holds what is not a finite number")
    return dict(content)


def load_strictly(network: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Put tensors of the public names into a network. One CheckpointError lists all that does not fit."""
    state = network.state_dict()
    given = {name: tensor for name, tensor in tensors.items() if not name.endswith(_COUNTER)}
    wanted = {name: tensor for name, tensor in state.items() if not name.endswith(_COUNTER)}
    misshapen = [
        f"{name} is {list(given[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    problems = [
        f"{len(names)} {what}: {quote(', '.join(names[:_LISTED]), 600)}" + (", ..." if len(names) > _LISTED else "")
        for what, names in (
            ("unknown", sorted(set(given) - set(wanted))),
            ("missing", sorted(set(wanted) - set(given))),
            ("of another shape", misshapen),
        )
        if names
    ]
    if problems:
        kind = type(network).__name__
        raise CheckpointError(f"{source}: its tensors are not those of {kind}: {'; '.join(problems)}")
    network.load_state_dict({**state, **{name: tensor.float() for name, tensor in given.items()}})


def rename_piergiaj(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return I3D tensors under the names of video_features; those of piergiaj's port are renamed, others kept."""
    renamed = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^logits\.", "conv3d_0c_1x1.", name)
        name = re.sub(r"^(Conv3d|Mixed)_\w+", lambda match: match[0].lower(), name)
        name = re.sub(r"^(mixed_\w+)\.b([0-3])([ab]?)\.", _branch, name)
        renamed[name.replace(".bn.", ".batch3d.")] = tensor
    return renamed


def _branch(match: re.Match[str]) -> str:
    layer = {"": "", "a": ".0", "b": ".1"}[match[3]]
    return f"{match[1]}.branch_{match[2]}{layer}."


_TORCHVISION = (
    (r"^feature_encoder\.", "fnet."),
    (r"^context_encoder\.", "cnet."),
    (r"^([fc]net)\.convnormrelu\.0\.", r"\1.conv1."),
    (r"^([fc]net)\.convnormrelu\.1\.", r"\1.norm1."),
    (r"^([fc]net\.layer\d\.\d)\.convnormrelu([12])\.0\.", r"\1.conv\2."),
    (r"^([fc]net\.layer\d\.\d)\.convnormrelu([12])\.1\.", r"\1.norm\2."),
    (r"^([fc]net)\.conv\.", r"\1.conv2."),
    (r"^update_block\.motion_encoder\.convcorr([12])\.0\.", r"update_block.encoder.convc\1."),
    (r"^update_block\.motion_encoder\.convflow([12])\.0\.", r"update_block.encoder.convf\1."),
    (r"^update_block\.motion_encoder\.conv\.0\.", "update_block.encoder.conv."),
    (r"^update_block\.recurrent_block\.convgru([12])\.conv([zrq])\.", r"update_block.gru.conv\2\1."),
    (r"^mask_predictor\.convrelu\.0\.", "update_block.mask.0."),
    (r"^mask_predictor\.conv\.", "update_block.mask.2."),
)


def rename_raft(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return RAFT tensors under the names of the network here: no `module.`, torchvision's renamed, no `norm3`.

    The public file holds the norm of a strided block twice. Raises CheckpointError where the two differ.
    """
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("module.")
        for pattern, instead in _TORCHVISION:
            name = re.sub(pattern, instead, name)
        renamed[name] = tensor
    for name in [name for name in renamed if ".norm3." in name]:
        copy, twin = renamed.pop(name), name.replace(".norm3.", ".downsample.1.")
        if not torch.equal(renamed.setdefault(twin, copy), copy):
            raise CheckpointError(f"'{name}' and '{twin}' differ; the file holds one norm twice, so they are the same")
    return renamed


def _load(network: Network, path: str | Path, rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> Network:
    tensors = read_tensors(path)
    try:
        load_strictly(network, rename(tensors), path)
    except CheckpointError as error:
        text = str(error)
        raise CheckpointError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    return network.eval()
