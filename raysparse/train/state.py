"""A trial's checkpoint: a folder that is whole or absent, hashed, and read without unpickling anything.

    FOLDER/weights.safetensors    the model's state_dict, exact zeros outside the masks
           ema.safetensors        the averaged weights, masked
           engine.safetensors     masks and what else the engine keeps
           optimizer.safetensors  moments
           manifest.json          the trial, the step, the accumulators, all numbers that are no tensors, and the
                                  sha256 of each file; written last

The folder is written under a temporary name beside its place, fsynced and renamed. The data order, the draws and the
learning rate are functions of (seed, step), so nothing of them is kept. What `raysparse import` makes is such a folder
with ema and engine alone: all that sampling and evaluation need (restored.py), too little to train on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from raysparse.errors import OtherCheckpoint, UsageError
from raysparse.files import TEMPORARY, remove_folder, sync
from raysparse.train import fits
from raysparse.train.folders import CHECKPOINT, checkpoints

if TYPE_CHECKING:
    from raysparse.train.loop import Trainer

FORMAT = 1
MANIFEST = "manifest.json"
PARTS = ("weights", "ema", "engine", "optimizer")
CONTENT = {"trial_id": str, "config": dict, "step": int, "trees": dict, "sha256": dict}  # of every manifest


def save(trainer: Trainer, folder: Path) -> Path:
    """Write the trainer's state to `folder` (absent, empty, or an older checkpoint to replace) and return `folder`.

    Called on all ranks at the same step; rank 0 writes, for the state is the same on each.
    """
    if trainer.rank != 0:
        return folder
    facts = {
        "trial_id": trainer.config.trial_id,
        "config": json.loads(trainer.config.dump_json()),
        "step": trainer.step,
        "world_size": trainer.world_size,
        "totals": dataclasses.asdict(trainer.totals),
        "origin": trainer.origin,
    }
    return write(folder, _parts(trainer), facts)


def write(folder: Path, parts: Mapping[str, Any], facts: Mapping[str, Any]) -> Path:
    """Write `parts`, trees of tensors and plain values, and a manifest of `facts`; whole or not at all.

    folder: absent, empty, or an older checkpoint to replace. facts: JSON, with trial_id, config and step.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=TEMPORARY))
    try:
        trees, hashes = {}, {}
        for part, state in parts.items():
            tensors: dict[str, Tensor] = {}
            trees[part] = _pack(state, part, tensors)
            path = temporary / f"{part}.safetensors"
            data = safetensors.torch.save(tensors)  # not save_file, whose error of a full disk is no OSError
            path.write_bytes(data)
            hashes[path.name] = _sha256(data)
            sync(path)
        content = {"format": FORMAT, **facts, "trees": trees, "sha256": hashes}
        text = json.dumps(content, sort_keys=True)
        path = temporary / MANIFEST
        path.write_text(json.dumps({"content": content, "sha256": _sha256(text.encode())}, sort_keys=True, indent=1))
        sync(path)
        temporary.chmod(0o755)  # mkdtemp makes 0700
        sync(temporary)
        _move_onto(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def load(trainer: Trainer, folder: Path) -> None:
    """Put a trainer, built from the same trial, into the state of a checkpoint.

    UsageError that names the file where one is missing, truncated or altered, OtherCheckpoint where the trial or
    what it was trained on is another; then the trainer is as it was.
    """
    content = manifest(folder)
    if content["trial_id"] != trainer.config.trial_id:
        raise OtherCheckpoint(
            f"{folder} is a checkpoint of trial {content['trial_id']}, not of {trainer.config.trial_id}: "
            f"{_differences(content['config'], json.loads(trainer.config.dump_json()))}; "
            "give the settings that it was made with, or another output folder"
        )
    if others := [what for what, digest in origin(content).items() if digest != trainer.origin.get(what)]:
        raise OtherCheckpoint(
            f"{folder} was trained on other data: its {' and '.join(others)} had another content; give back what it "
            "began with, or another output folder to train anew"
        )
    if missing := [part for part in PARTS if part not in content["trees"]]:
        raise OtherCheckpoint(
            f"{folder} was imported and has no {', '.join(missing)}: it can be sampled, evaluated and exported, not "
            "trained on; train from a checkpoint of `raysparse train`"
        )
    parts = {part: read(folder, part, content) for part in PARTS}
    _check_fits(trainer, parts, content, folder)
    trainer.model.load_state_dict(parts["weights"])
    trainer.ema.model.load_state_dict(parts["ema"])
    trainer.optimizer.load_state_dict(parts["optimizer"])
    _lay_out(trainer.optimizer)
    trainer.engine.load_state_dict(parts["engine"]["engine"])
    trainer.masks_reported = {name: mask.to(trainer.device) for name, mask in parts["engine"]["reported"].items()}
    trainer.totals = type(trainer.totals)(**content["totals"])
    trainer.step = content["step"]


def _check_fits(trainer: Trainer, parts: Mapping[str, Any], content: Mapping[str, Any], folder: Path) -> None:
    """Whole files may still be of something else, or made to do harm. UsageError, before anything is loaded."""
    fits.check_state(trainer.model.state_dict(), parts["weights"], f"{folder}: these are not this model's weights")
    fits.check_state(trainer.ema.model.state_dict(), parts["ema"], f"{folder}: these are not this model's averages")
    fits.check_optimizer(trainer.optimizer, parts["optimizer"], f"{folder}: optimizer")
    engine = parts["engine"]
    if not isinstance(engine, dict) or engine.keys() != {"engine", "reported"}:
        raise UsageError(f"{folder}: the part engine is of something else")
    fits.check_state(trainer.engine.masks, engine["reported"], f"{folder}: these are not this model's masks")
    trainer.engine.check_state(engine["engine"])
    fits.check_fields(type(trainer.totals), content.get("totals"), f"{folder}: totals", later=["compile_s"])
    if not 0 <= content["step"] <= trainer.config.train.steps:
        raise UsageError(f"{folder}: step {content['step']} is not one of the trial's {trainer.config.train.steps}")


def manifest(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's manifest. UsageError where it is missing or damaged."""
    path = folder / MANIFEST
    try:
        outer = json.loads(path.read_text(encoding="utf-8"))
        content: dict[str, Any] = outer["content"]
        intact = outer["sha256"] == _sha256(json.dumps(content, sort_keys=True).encode())
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{folder} is no checkpoint: it has no {MANIFEST}; where it was one, remove it to go on from the one before"
        ) from None
    except (KeyError, TypeError):
        raise _of_something_else(folder) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if not intact:
        raise _damaged(path, "its sha256 does not match")
    if not isinstance(content, dict) or "format" not in content:
        raise _of_something_else(folder)
    if content["format"] != FORMAT:
        raise OtherCheckpoint(
            f"{path} has format {content['format']}, this raysparse reads {FORMAT}; use the one that wrote it"
        )
    if not all(type(content.get(name)) is kind for name, kind in CONTENT.items()):
        raise _of_something_else(folder)
    return content


def origin(content: Mapping[str, Any]) -> dict[str, str | None]:
    """Of a manifest's content: hashes of the examples and of the first stage, nothing where they were not kept yet."""
    kept = content.get("origin")
    return kept if isinstance(kept, dict) else {}


def _of_something_else(folder: Path) -> UsageError:
    return UsageError(f"{folder} is no checkpoint: its {MANIFEST} is of something else")


def read(folder: Path, part: str, content: Mapping[str, Any]) -> Any:
    """One part of a checkpoint, as it was written. content: its manifest. UsageError where the file is damaged, or the
    manifest tells of it what cannot be."""
    tensors = _tensors(folder, part, content["sha256"])
    try:
        return _unpack(content["trees"][part], tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{folder / MANIFEST} does not describe {part}.safetensors: {error!r}") from None


def at_step(parent: Path, step: int) -> Path:
    """The folder of a step's checkpoint among a trial's checkpoints."""
    return parent / f"step-{step:09d}"


def latest(parent: Path) -> Path | None:
    """The checkpoint of the highest step in a trial's folder, None where there is none.

    Removes what an interrupted `save` left behind; only for the one process that writes there.
    """
    remove_leftovers(parent)
    found = checkpoints(parent)
    return found[-1] if found else None


def remove_leftovers(parent: Path) -> None:
    """Remove what an interrupted `save` left in a trial's folder; only for the one process that writes there.

    A checkpoint that was to be replaced, and was not, has its name back.
    """
    for replaced in parent.glob(f"{TEMPORARY}step-*"):
        if not (folder := parent / replaced.name.removeprefix(TEMPORARY)).exists():
            replaced.rename(folder)
    for leftover in parent.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def keep_latest(parent: Path, count: int) -> None:
    """Remove all checkpoints of a trial but the `count` of the highest steps."""
    found = checkpoints(parent)
    for old in found[: max(0, len(found) - count)]:
        remove_folder(old)


def _parts(trainer: Trainer) -> dict[str, Any]:
    trainer.engine.apply_to(trainer.ema.parameters())
    return {
        "weights": trainer.model.state_dict(),
        "ema": trainer.ema.evaluation_model().state_dict(),
        "engine": {"engine": trainer.engine.state_dict(), "reported": trainer.masks_reported},
        "optimizer": trainer.optimizer.state_dict(),
    }


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded moments their parameter's memory format: files hold row-major tensors, the weights may be otherwise.

    A fused step over two formats would pair each weight with the moments of another.
    """
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                kept[name] = torch.empty_like(parameter).copy_(value)


def _pack(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`node` as JSON, its tensors moved to `tensors` under names that tell their place; `_unpack` gives it back."""
    if isinstance(node, Tensor):
        # A copy of its own: safetensors refuses tensors that share memory, such as cuDNN's flat GRU weights.
        tensors[path] = node.detach().to("cpu", copy=True).contiguous()
        return {"tensor": path}
    if isinstance(node, dict):
        return {"dict": [[key, _pack(value, f"{path}.{key}", tensors)] for key, value in node.items()]}
    if isinstance(node, (list, tuple)):
        kind = "tuple" if isinstance(node, tuple) else "list"
        return {kind: [_pack(value, f"{path}.{place}", tensors) for place, value in enumerate(node)]}
    if node is None or isinstance(node, (bool, int, float, str)):
        return node
    raise TypeError(f"{path}: a checkpoint holds tensors, numbers, text and containers of them, got {type(node)}")


def _unpack(node: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in value}
    items = [_unpack(item, tensors) for item in value]
    return tuple(items) if kind == "tuple" else items


def _tensors(folder: Path, part: str, hashes: dict[str, str]) -> dict[str, Tensor]:
    path = folder / f"{part}.safetensors"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    if _sha256(data) != hashes.get(path.name):
        raise _damaged(path, f"{len(data)} bytes whose sha256 does not match the manifest")
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except Exception as error:  # SafetensorError, and what torch says of a type or shape that it does not have
        raise _damaged(path, str(error)) from None
    return tensors


def _damaged(path: Path, why: str) -> UsageError:
    folder = path.parent
    if CHECKPOINT.fullmatch(folder.name):
        return UsageError(
            f"checkpoint file {path} is damaged ({why}); remove the folder {folder} to go on from the one before it"
        )
    again = f"raysparse import EXPORTED --to {shlex.quote(str(folder))}"
    return UsageError(f"{path} is damaged ({why}); remove the folder {folder} and make it again, such as by: {again}")


def _differences(theirs: dict[str, Any], ours: dict[str, Any], path: str = "") -> str:
    """`train.steps 100 there, 200 here; ...`: the settings in which two trials differ."""
    found = []
    for name in sorted(theirs.keys() | ours.keys()):
        there, here = theirs.get(name), ours.get(name)
        if isinstance(there, dict) and isinstance(here, dict):
            found.append(_differences(there, here, f"{path}{name}."))
        elif there != here:
            found.append(f"{path}{name} {there!r} there, {here!r} here")
    return "; ".join(text for text in found if text)


def _move_onto(temporary: Path, folder: Path) -> None:
    """Rename; a folder that is there already is set aside first, so that what carries the name is always whole.

    A process that ends between the two renames leaves it where `remove_leftovers` knows it as whole.
    """
    if folder.is_dir() and any(folder.iterdir()):
        aside = folder.with_name(f"{TEMPORARY}{folder.name}")
        if aside.exists():  # of a rename that failed before
            remove_folder(aside)
        folder.rename(aside)
        temporary.rename(folder)
        remove_folder(aside)  # half removed it has another name
    else:
        temporary.rename(folder)
    sync(folder.parent)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
