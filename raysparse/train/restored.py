"""A trained model, back from disk: what sampling, evaluation and export start from.

Reads a checkpoint of `raysparse train` or `sweep`, and the folder that `raysparse import` makes. Only the averaged
weights and the masks are loaded; the trained weights and the moments, two thirds of a checkpoint, stay on disk.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raysparse import config as configs
from raysparse import plugins
from raysparse.config import TrialConfig
from raysparse.errors import UsageError
from raysparse.sparse import layout
from raysparse.sparse.ranges import ByTimestep
from raysparse.train import checks, fits, state
from raysparse.train.folders import checkpoints

EXPORTED = "raysparse.json"  # what an exported folder has and a checkpoint has not
FIRST_STAGE = "first_stage"  # an imported folder brings its own, as diffusers has it


@dataclasses.dataclass(frozen=True)
class Restored:
    """A trial's model at one step.

    model: the averaged weights, exactly 0 outside the masks, in eval mode, without gradients.
    trial_id: the one that was trained; config.trial_id can be another where the first stage now lies elsewhere.
    masks: parameter name -> bool, the weight's shape, true where active; empty for the dense method.
    network: what to call for a prediction: the model, or what goes by its masks per range of timesteps.
    facts: what the manifest says beside these, such as the measurements that an imported folder brought along.
    """

    config: TrialConfig
    model: nn.Module
    network: nn.Module
    masks: dict[str, Tensor]
    step: int
    trial_id: str
    folder: Path
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load(folder: Path, device: str | torch.device = "cpu") -> Restored:
    """The model of a checkpoint, of a trial's latest one, or of the one trial of a results folder.

    UsageError: nothing or several trials there, a damaged file, a checkpoint whose tensors are not its model's.
    """
    place = latest(folder)
    content = state.manifest(place)
    trial = configs.parse(_with_own_first_stage(content, place), str(place / state.MANIFEST))
    weights = state.read(place, "ema", content)
    engine = state.read(place, "engine", content)["engine"]
    masks: dict[str, Tensor] = engine["masks"]
    model = model_of(trial, weights, masks, str(place)).to(device)
    if trial.train.channels_last:
        model = model.to(memory_format=torch.channels_last)  # as in training: other kernels round otherwise
    return Restored(
        config=trial,
        model=model,
        network=_network(trial, model, engine.get("ranges", [])),
        masks={name: mask.to(device) for name, mask in masks.items()},
        step=content["step"],
        trial_id=content["trial_id"],
        folder=place,
        facts=content.get("facts", {}),
    )


def latest(path: Path) -> Path:
    """The checkpoint that a user means by `path`. UsageError where there is not exactly one trial."""
    found = find(path)
    if len(found) > 1:
        some = ", ".join(str(folder.parent) for folder in found[: fits.NAMED])
        raise UsageError(f"{path} holds {len(found)} trials; give the folder of one, such as {some}")
    return found[0]


def find(path: Path) -> list[Path]:
    """The latest checkpoint of every trial below a results folder, sorted by trial; at least one.

    path: a results folder, its folder `checkpoints`, a trial's folder there, one checkpoint, or an imported folder.
    UsageError where there is none. Half-written ones are passed over; what is in a file is not looked at.
    """
    if not path.is_dir():
        raise UsageError(f"{path} is {'a file' if path.exists() else 'absent'}; give the folder of a checkpoint")
    if (path / state.MANIFEST).is_file():
        return [path]
    if (path / EXPORTED).is_file():
        raise UsageError(f"{path} is an exported folder; first: raysparse import {shlex.quote(str(path))} --to FOLDER")
    if own := checkpoints(path):
        return own[-1:]
    trials = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = [steps[-1] for trial in sorted(trials.iterdir()) if (steps := checkpoints(trial))]
    if not found:
        raise UsageError(
            f"there is no checkpoint in {path}: give a results folder, a trial's folder among its checkpoints, or one "
            f"of the folders step-* there, which has a {state.MANIFEST}"
        )
    return found


def to_evaluate(path: Path) -> tuple[list[Path], list[Path]]:
    """The checkpoints of `find`, those first that an evaluation is for: of several trials the ones at their last step.

    Others, such as those that ASHA stopped, compare with none of them. UsageError where all of several are such.
    """
    found = find(path)
    if len(found) == 1:
        return found, []
    contents = {folder: state.manifest(folder) for folder in found}
    ended = [folder for folder, of in contents.items() if of["step"] >= of["config"]["train"]["steps"]]
    if not ended:
        raise UsageError(
            f"none of the {len(found)} trials in {path} has reached its last step; to evaluate one as it is, give its "
            f"folder, such as {found[0].parent}"
        )
    return ended, [folder for folder in found if folder not in ended]


def model_of(trial: TrialConfig, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], where: str) -> nn.Module:
    """A trial's model with the given state, on the CPU, in eval mode and without gradients.

    UsageError, told with `where`: tensors that are missing, too many, or of another shape or type than the model's,
    weights that are no numbers, and those that are not 0 outside their masks.
    """
    module, options = plugins.load("models", trial.model.name), checks.model_options(trial)
    with torch.device("meta"):  # what does not fit is found before memory is taken for it
        outline: nn.Module = module.build(options, seed=trial.seed)
    fits.check_state(outline.state_dict(), weights, f"{where}: these are no weights of model {trial.model.name!r}")
    if broken := {name for name, weight in weights.items() if not _finite(weight)}:
        raise UsageError(
            f"{where}: NaN or infinity in {fits.some(broken)}: the model diverged, or another program wrote it; take "
            "an earlier checkpoint"
        )
    _check_masks(dict(outline.named_parameters()), weights, masks, where)
    _check_pattern(trial, masks, where)
    model: nn.Module = module.build(options, seed=trial.seed)
    model.load_state_dict(dict(weights))
    return model.eval().requires_grad_(False)


def _finite(weight: Tensor) -> bool:
    """Whether all are numbers, without which samples are gray. The sum alone takes .1 s of 274M weights, isfinite 2."""
    return bool(weight.sum().isfinite()) or bool(weight.isfinite().all())


def _network(trial: TrialConfig, model: nn.Module, ranges: Sequence[Mapping[str, Tensor]]) -> nn.Module:
    if not ranges:
        return model
    device = next(model.parameters()).device
    masks = [{name: mask.to(device) for name, mask in own.items()} for own in ranges]
    return ByTimestep(model, masks, trial.sparse.settings().bounds())


def _with_own_first_stage(content: Mapping[str, Any], place: Path) -> Mapping[str, Any]:
    """The settings, with the first stage that lies in an imported folder, wherever that was moved; with the hash of the
    one whose latents were trained on, so that no other decodes the samples."""
    config, own, identity = content["config"], place / FIRST_STAGE, state.origin(content).get("first_stage")
    if identity is not None:
        config = configs.with_value(config, "first_stage.sha256", identity)
    return configs.with_value(config, "first_stage.weights", str(own)) if own.is_dir() else config


def _check_masks(
    parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], where: str
) -> None:
    if unknown := masks.keys() - parameters.keys():
        raise UsageError(f"{where}: masks of weights that the model does not have: {fits.some(unknown)}")
    for name, mask in masks.items():
        if mask.shape != weights[name].shape or mask.dtype != torch.bool:
            raise UsageError(
                f"{where}: the mask of {name!r} is {fits.kind(mask)}, its weight {fits.kind(weights[name])}"
            )
        if bool(weights[name][~mask].count_nonzero()):
            raise UsageError(f"{where}: {name!r} is not 0 outside its mask: they are masks of other weights")


def _check_pattern(trial: TrialConfig, masks: Mapping[str, Tensor], where: str) -> None:
    """UsageError for masks that are not what the trial's settings say: kernels by blocks would look for blocks."""
    pattern, stages = trial.sparse.setting("pattern"), trial.sparse.setting("stages")
    if not masks or pattern in (None, "element") or stages not in (None, "fixed"):  # a stage has a pattern of its own
        return
    patterns, _, _ = layout.patterns_of(masks, trial.sparse.settings())
    if broken := {name for name, mask in masks.items() if not (mask.all() or patterns[name].valid(mask))}:
        raise UsageError(
            f"{where}: these masks do not keep sparse.pattern {pattern!r}, with which the trial says that it was "
            f"trained: {fits.some(broken)}; take a checkpoint whose files belong together"
        )
