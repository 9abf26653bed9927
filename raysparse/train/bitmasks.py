"""Masks on disk: one bit per weight in safetensors, with what they are and which weights they belong to in the header.

Each tensor is uint8 [ceil(weights / 8)] under its weight's name in the weights file: numpy.packbits of the mask in
row-major order, the first weight in the highest bit, 0 in the bits beyond the last weight. The header's one entry,
`raysparse`, is JSON with sorted keys (safetensors writes several entries in any order, one is the same bytes again):

    format, packing    how to read the file
    weights_file       the safetensors file they belong to, and weights_sha256, of its bytes
    ...                facts of the one who writes: method, sparsity, step, trial_id
    tensors            name -> {"shape", "active", "density"}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysparse.errors import UsageError

FORMAT = 1
PACKING = "numpy.packbits, row-major, highest bit first"
KEY = "raysparse"


def save(path: Path, masks: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write `masks`, name -> bool tensor on any device; the same masks and facts give the same bytes."""
    from safetensors.torch import save_file

    packed, tensors = {}, {}
    for name in sorted(masks):
        bits = masks[name].cpu().contiguous().numpy()
        packed[name] = torch.from_numpy(np.packbits(bits.reshape(-1)))
        active = int(np.count_nonzero(bits))
        tensors[name] = {"shape": list(bits.shape), "active": active, "density": active / bits.size}
    header = {**facts, "format": FORMAT, "packing": PACKING, "tensors": tensors}
    save_file(packed, path, metadata={KEY: json.dumps(header, sort_keys=True)})


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The masks and the header. UsageError naming the file and the tensor where they are damaged or disagree."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = _header(path, file.metadata() or {})
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
    except (OSError, SafetensorError) as error:
        raise damaged(path, str(error)) from error
    tensors = header["tensors"]
    if tensors.keys() != packed.keys():
        differing = ", ".join(sorted(tensors.keys() ^ packed.keys())[:3])
        raise damaged(path, f"its header and its tensors differ in {differing}")
    return {name: _unpack(path, name, packed[name], tensors[name]) for name in packed}, header


def damaged(path: Path, why: str) -> UsageError:
    return UsageError(f"{path} is damaged ({why}); get it again, or export the checkpoint again")


def _header(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(metadata[KEY])
        known = header["format"], header["packing"]
        if not isinstance(header["tensors"], dict) or not isinstance(header["weights_sha256"], str):
            raise TypeError("of other types")
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UsageError(f"{path} holds no masks of raysparse: its header does not say what they are") from None
    if known != (FORMAT, PACKING):
        raise UsageError(f"{path} has format {known}, this raysparse reads {(FORMAT, PACKING)}; use the one it is from")
    return header


def _unpack(path: Path, name: str, packed: Tensor, facts: Any) -> Tensor:
    """The mask of one tensor. Sizes are compared before anything of the stated shape is made."""
    shape = facts.get("shape") if isinstance(facts, dict) else None
    if not isinstance(shape, list) or not all(type(side) is int and side > 0 for side in shape):
        raise damaged(path, f"{name!r} has shape {shape!r}")
    size = math.prod(shape)
    if packed.dtype != torch.uint8 or list(packed.shape) != [math.ceil(size / 8)]:
        kind = f"{str(packed.dtype).removeprefix('torch.')} {list(packed.shape)}"
        raise damaged(path, f"{name!r} is {kind}; {size} weights take uint8 [{math.ceil(size / 8)}]")
    bits = np.unpackbits(packed.numpy()).view(np.bool_)
    if bits[size:].any():
        raise damaged(path, f"{name!r} has bits set beyond its {size} weights")
    if (active := int(np.count_nonzero(bits))) != facts.get("active"):
        raise damaged(path, f"{name!r} has {active} active weights, its header says {facts.get('active')!r}")
    return torch.from_numpy(bits[:size].copy()).reshape(shape)
