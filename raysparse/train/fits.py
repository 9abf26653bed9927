"""Whether what a checkpoint holds is a state of the thing it is to be loaded into; UsageError before anything changes.

A checkpoint's hashes tell damage. They do not tell who wrote it: a manifest can be sealed by anybody.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from raysparse.errors import UsageError

NAMED = 3  # so many names in a message are enough


def check_state(expected: Mapping[str, Tensor], got: Any, what: str) -> None:
    """The same names, shapes and types."""
    if not isinstance(got, Mapping) or not all(isinstance(value, Tensor) for value in got.values()):
        raise UsageError(f"{what}: they are no tensors by name")
    for problem, names in (("missing", expected.keys() - got.keys()), ("unknown", got.keys() - expected.keys())):
        if names:
            raise UsageError(f"{what}: {problem} {some(names)}; the settings beside them must be those they had")
    for name, tensor in expected.items():
        mine, theirs = kind(tensor), kind(got[name])
        if mine != theirs:
            raise UsageError(f"{what}: {name!r} is {theirs}, the model's is {mine}")


def check_optimizer(optimizer: torch.optim.Optimizer, got: Any, what: str) -> None:
    """The same groups of parameters, and moments that have their parameter's shape or are one number."""
    mine = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    groups = got.get("param_groups") if isinstance(got, Mapping) else None
    moments = got.get("state") if isinstance(got, Mapping) else None
    if not isinstance(groups, list) or not isinstance(moments, Mapping) or len(groups) != len(mine):
        raise UsageError(f"{what}: it is no state of {type(optimizer).__name__}")
    for ours, theirs in zip(mine, groups, strict=True):
        if not isinstance(theirs, Mapping) or theirs.get("params") != ours["params"]:
            raise UsageError(f"{what}: it is of other parameters or another optimizer than {type(optimizer).__name__}")
        for name, value in ours.items():
            # lr follows from the step; another version of torch may have a setting more or less.
            if name != "lr" and theirs.get(name, value) != value:
                raise UsageError(f"{what}: {name} is {theirs[name]!r}, the trial's is {value!r}")
    for place, kept in moments.items():
        if place not in range(len(parameters)) or not isinstance(kept, Mapping):
            raise UsageError(f"{what}: it has moments of a parameter {place!r}, which is not there")
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameters[place].shape:
                raise UsageError(f"{what}: {name} of parameter {place} is {kind(value)}")


def check_fields(of: type[Any], got: Any, what: str, later: Collection[str] = ()) -> None:
    """The values of a dataclass of numbers and text, by name. later: what checkpoints of before have not."""
    fields = {field.name: field.type for field in dataclasses.fields(of)}
    if not isinstance(got, Mapping) or got.keys() | set(later) != fields.keys():
        raise UsageError(f"{what}: it has not the fields {', '.join(sorted(fields))}")
    types: dict[str, tuple[type, ...]] = {"float": (int, float), "int": (int,), "str | None": (str, type(None))}
    for name, declared in fields.items():
        if name in got and not isinstance(got[name], types[str(declared)]):
            raise UsageError(f"{what}: {name} is {got[name]!r}, not {declared}")


def kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def some(names: Any) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - NAMED} more" if len(ordered) > NAMED else ""
    return ", ".join(map(repr, ordered[:NAMED])) + more
