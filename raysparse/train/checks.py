"""What can be said of a trial before it starts. UsageError for what would end it later."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from raysparse import plugins
from raysparse.config import TrialConfig
from raysparse.data import prepared
from raysparse.data.sketch import Examples
from raysparse.diffusion.schedule import NoiseSchedule
from raysparse.errors import UsageError, usage_error_from
from raysparse.train import costs, runtime


def check_settings(config: TrialConfig) -> None:
    """Of the settings alone; nothing is prepared or trained."""
    check_sampling(config)
    if config.data.source is not None and not Path(config.data.source).exists():
        raise UsageError(f"data.source {config.data.source} does not exist; give the path of the raw data")


def check_sampling(config: TrialConfig) -> None:
    """Of the settings alone, without what lies on this machine: pictures are drawn without data."""
    timesteps = getattr(model_options(config), "timesteps", config.diffusion.timesteps)
    if timesteps != config.diffusion.timesteps:
        raise UsageError(
            f"model.options.timesteps is {timesteps}, diffusion.timesteps {config.diffusion.timesteps}: they are one "
            "number, set both"
        )
    NoiseSchedule(**config.diffusion.model_dump())
    if config.evaluate.ddim_steps > config.diffusion.timesteps:
        raise UsageError(
            f"evaluate.ddim_steps {config.evaluate.ddim_steps} is above diffusion.timesteps "
            f"{config.diffusion.timesteps}; lower it"
        )
    _check_inputs(config)
    _check_parts(config)
    _check_layout(config)
    _check_stages(config)
    check_ranges(config)
    runtime.check_method(config)


def check_data(config: TrialConfig, training: Any) -> None:
    """Of the settings and the prepared training examples."""
    _check_shape(config, training)
    _check_classes(config, training)


def model_options(config: TrialConfig) -> BaseModel:
    """A model's Config, checked. UsageError naming the key, with the nearest valid one."""
    model: type[BaseModel] = plugins.load("models", config.model.name).Config
    try:
        return model.model_validate(dict(config.model.options))
    except ValidationError as error:
        raise usage_error_from(error, f"options of model {config.model.name!r}", model) from None


def check_denoiser(name: str) -> None:
    """UsageError where a model is another part of a trial."""
    kind = plugins.load("models", name).KIND
    if kind != "denoiser":
        raise UsageError(f"model.name {name!r} is a {kind.replace('_', ' ')}, not a denoiser")


def _check_parts(config: TrialConfig) -> None:
    """That the parts of a trial go together, as far as their files say."""
    model, spec = plugins.load("models", config.model.name), plugins.load("datasets", config.data.name).SPEC
    check_denoiser(config.model.name)
    if config.first_stage and spec.kind != "image":
        raise UsageError(f"first_stage encodes pictures, but {config.data.name} holds sketches; leave it out")
    if config.first_stage and plugins.load("models", config.first_stage.name).KIND != "first_stage":
        raise UsageError(f"first_stage.name {config.first_stage.name!r} is a denoiser; give a first stage: autoencoder")
    if config.train.compile and (why := getattr(model, "NOT_COMPILED", None)):
        raise UsageError(
            f"train.compile is true, but {config.model.name} {why}; leave it out (on a GPU train.cuda_graph records "
            "its step instead)"
        )
    asked = {"train.label_dropout": config.train.label_dropout or None, "evaluate.guidance": config.evaluate.guidance}
    for name, value in asked.items():
        if value is not None and null_label(config) is None:
            raise UsageError(
                f"{name} is {value}, but {config.model.name} has no null class here: use a class-conditional "
                "latent_unet (model.options.num_classes), or leave it out"
            )


def _check_inputs(config: TrialConfig) -> None:
    """That a model whose inputs are of one representation of sketches is given that one."""
    given = getattr(prepared.check_options(config.data.name, config.data.options), "representation", None)
    wanted = getattr(model_options(config), "inputs", "plain")
    if given is not None and wanted not in ("plain", given):
        raise UsageError(
            f"model.options.inputs is {wanted}, data.options.representation {given}: set both to the same, or inputs "
            "to plain"
        )


def _check_layout(config: TrialConfig) -> None:
    """That the method's pattern fits a layer of the model, and that S, in each range, leaves every layer enough."""
    if plugins.load("methods", config.sparse.method).METHOD.sparse:
        costs.laid_out(_outline(config), config)


def _check_stages(config: TrialConfig) -> None:
    """That the last stage of the method's patterns is reached."""
    patterns: list[Any] = getattr(config.sparse.settings(), "patterns", list)()
    needed = (len(patterns) - 1) * (config.sparse.setting("stage_steps") or 0)
    if len(patterns) > 1 and needed >= config.train.steps:
        raise UsageError(
            f"stages {config.sparse.setting('stages')!r} of {config.sparse.setting('stage_steps')} steps each begin "
            f"the last one at step {needed}, but train.steps is {config.train.steps}; lower stage_steps"
        )


def check_ranges(config: TrialConfig) -> None:
    """That masks per range of timesteps cover the trial's timesteps, and that one graph is not asked for."""
    if config.sparse.setting("ranges") is None:
        return
    end = config.sparse.settings().bounds()[-1]
    if end != config.diffusion.timesteps:
        raise UsageError(
            f"ranges {config.sparse.setting('ranges')!r} end at {end}, but diffusion.timesteps is "
            f"{config.diffusion.timesteps}: every timestep needs a mask, and there are no others"
        )
    for name in ("compile", "cuda_graph"):
        if getattr(config.train, name):
            raise UsageError(
                f"train.{name} is true, but a mask per range of timesteps splits each batch anew, and one split is "
                "not another; leave it out"
            )


def null_label(config: TrialConfig) -> int | None:
    """The class of the trial's model that stands for none; None: it has no such class."""
    found: int | None = getattr(_outline(config), "null_label", None)
    return found


def _outline(config: TrialConfig) -> torch.nn.Module:
    """The trial's model for what does not depend on its values; the trials of a sweep share it."""
    # As in costs.py: without PyTorch's compiler, which the meta device imports.
    sketch = plugins.load("datasets", config.data.name).SPEC.kind == "sketch"
    options = model_options(config)
    return _built(config.model.name, options.model_dump_json(), "cpu" if sketch else "meta")


@functools.lru_cache(maxsize=8)
def _built(name: str, options: str, device: str) -> torch.nn.Module:
    module = plugins.load("models", name)
    with torch.device(device):
        model: torch.nn.Module = module.build(module.Config.model_validate_json(options), seed=0)
    return model


def value_shape(config: TrialConfig) -> tuple[int, ...]:
    """The shape of one example as the trial's model takes it: [C, H, W], sketches [1, 3] (of one point)."""
    module = plugins.load("models", config.model.name)
    return tuple(module.example(model_options(config), 1, 1, device="meta")["x"].shape[1:])


def _check_shape(config: TrialConfig, training: Any) -> None:
    """The model takes examples of the data set's shape."""
    takes = value_shape(config)
    given = (1, 3) if isinstance(training, Examples) else tuple(training.value_shape)
    if takes != given:
        what = "sketches" if isinstance(training, Examples) else f"examples of shape {list(given)}"
        raise UsageError(
            f"model {config.model.name} takes {'sketches' if takes == (1, 3) else f'x of shape {list(takes)}'}, but "
            f"data set {config.data.name} has {what}; change model.options, data.options.size_px or first_stage"
        )


def _check_classes(config: TrialConfig, training: Any) -> None:
    """A conditional model needs the classes of a conditional data set, and the other way round."""
    wanted = getattr(model_options(config), "num_classes", None)
    given = training.num_classes if training.labels is not None else None
    if wanted != given:
        raise UsageError(
            f"model.options.num_classes is {wanted}, but the data set has {given or 'no'} classes; "
            f"set it to {given or 'null'}"
        )
