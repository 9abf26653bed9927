"""What runs a model: PyTorch, or kernels that leave out the weights that are 0.

A model's file that has such kernels has two functions; both raise UsageError where this machine or the model can't:

    sparse_runtime(model) -> nn.Module        for sampling: the same function of the same arguments, to rounding, of the
                                              weights as they are now
    sparse_step(model, masks) -> Step         for training: the same, of the weights as they are at each call, with the
                                              gradients of active weights
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from raysparse import plugins
from raysparse.config import TrialConfig
from raysparse.errors import UsageError

if TYPE_CHECKING:
    from raysparse.sparse.engine import SparseEngine

T = TypeVar("T")


class Step(Protocol):
    """What trains in the model's place."""

    def __call__(self, x: Tensor, timesteps: Tensor, **cond: Tensor) -> Tensor: ...

    def pays_for(self, examples: int) -> bool:
        """Whether it is faster than the model itself, for so many examples at a time."""

    def follow(self, masks: Mapping[str, Tensor]) -> None:
        """Take over the masks; it costs nothing where they have not changed."""


def check_method(config: TrialConfig) -> None:
    """UsageError where a runtime is 'sparse' that the trial's method never has, whatever the machine."""
    for setting, section in (("train.runtime", config.train), ("evaluate.runtime", config.evaluate)):
        if section.runtime == "sparse" and (why := _why_dense(config, training=section is config.train)):
            raise _cannot(setting, why)


def _why_dense(config: TrialConfig, *, training: bool) -> str | None:
    """Why the trial's method has no kernels, if so."""
    method = plugins.load("methods", config.sparse.method).METHOD
    if method.by_timestep:
        return f"method {config.sparse.method!r} has masks by timestep; the kernels take one set"
    if method.straight_through and training:
        return f"method {config.sparse.method!r} trains the weights that the kernels would leave out"
    return None


def _cannot(setting: str, why: object) -> UsageError:
    return UsageError(f"{setting} 'sparse' cannot run here; use 'dense' or 'auto', or mend this: {why}")


def check(config: TrialConfig, device: torch.device) -> None:
    """That the trial's sampling runtime can run here, tried on the model's smallest size. UsageError where it can't."""
    if config.evaluate.runtime != "sparse":
        return
    module = plugins.load("models", config.model.name)
    with torch.device("cpu"):
        small = module.build(module.Config(**module.SMALL), seed=0)
    for_sampling(_without_zeros(small).to(device), config)


def check_trial(model: nn.Module, engine: SparseEngine, config: TrialConfig) -> None:
    """That a GPU leaves out zeros in a trial's evaluations: now, not at the first of them. UsageError where it can't.

    Masks alone say so, now and later: how many blocks a layer has does not change with the topology. Which units they
    have emptied does.
    """
    if config.evaluate.runtime != "sparse" or _device(model).type != "cuda":
        return
    stages = config.sparse.setting("stages")
    if stages not in (None, "fixed"):  # then the masks at hand are not the last ones
        if _evaluates_earlier_stages(config):
            raise UsageError(
                "evaluate.runtime is 'sparse', but a GPU leaves out no zeros of the stages before the last "
                f"(sparse.stages {stages!r}); use 'dense' or 'auto', and --runtime sparse for the trained model"
            )
        return
    masked = _without_zeros(copy.deepcopy(model))
    engine.apply_to(dict(masked.named_parameters()))
    vars(masked)["remove_dead_units"] = None  # in the method's place: units that are empty now need not be later
    for_sampling(engine.network(masked), config)


def _without_zeros(model: nn.Module) -> nn.Module:
    """The model, all ones: layers that start at zero would count as sparse ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    return model


def _evaluates_earlier_stages(config: TrialConfig) -> bool:
    """Whether an evaluation meets a stage before the last that has enough zeros to be no dense one."""
    settings: Any = config.sparse.settings()
    first = settings.stage(min(config.evaluate.every_steps, config.train.steps))
    return any(n <= 0.75 * m for n, m in settings.patterns()[first:-1])


def for_sampling(model: nn.Module, config: TrialConfig) -> nn.Module:
    """`model`, or what stands for it under `evaluate.runtime`; made anew whenever its weights have changed.

    auto: sparse where that can run, on a CPU. UsageError: sparse where it can't.
    """

    device = _device(model)

    def made() -> nn.Module:
        with autocast(config.sampling_precision, device):  # kernels compute in its type
            network: nn.Module = _kernels(config, "sparse_runtime")(model)
        if device.type == "cuda" and config.sparse.sparsity:
            _check_pattern(config)
        return network

    wanted = config.evaluate.runtime
    if wanted == "auto" and device.type == "cuda":
        return model  # kernels there are faster in a compiled loop; here each starts by itself, which was not timed
    return _chosen("evaluate.runtime", wanted, made) or model


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """To bfloat16 where that is the precision, fp32 or bf16."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def _check_pattern(config: TrialConfig) -> None:
    """UsageError where a GPU leaves out no zeros of the trial's pattern: now, not after the first steps."""
    pattern = config.sparse.setting("pattern")
    if pattern in ("element", "diagonal"):
        raise UsageError(
            f"zeros of sparse.pattern {pattern} save no time on a GPU; train with block (sparse.block: 64) or nm"
        )
    if pattern == "nm" and config.sampling_precision != "bf16":
        raise UsageError(f"2:4 is for evaluate.precision bf16, the trial samples in {config.sampling_precision}")


def for_training(model: nn.Module, config: TrialConfig, engine: SparseEngine, examples: int) -> Step | None:
    """What trains in the model's place under `train.runtime`, on so many examples at a time; None: the model itself.

    auto: sparse where that can run and is faster; on a GPU in steps that are compiled and recorded. Errors as above.
    """

    def made() -> Step:
        with autocast(config.train.precision, device):  # a dense product may be faster in its type
            step: Step = _kernels(config, "sparse_step")(model, engine.masks)
        return step

    train, device = config.train, _device(model)
    recorded = train.compile and train.cuda_graph and train.precision == "bf16"
    if train.runtime == "auto" and device.type == "cuda" and not recorded:
        # On an H200 a step of U-ViT small/2 with a tenth of blocks of 64 left takes .75 of the dense one's time where
        # both are compiled and recorded, in bfloat16; compiled alone, 1.12: its kernels end before the next ones start.
        return None
    step = _chosen("train.runtime", train.runtime, made)
    return None if step is not None and train.runtime == "auto" and not step.pays_for(examples) else step


def _kernels(config: TrialConfig, function: str) -> Callable[..., Any]:
    """The function of the model's file. UsageError where it has none, or does not compute what the method does."""
    if why := _why_dense(config, training=function == "sparse_step"):
        raise UsageError(why)
    found: Callable[..., Any] | None = getattr(plugins.load("models", config.model.name), function, None)
    if found is None:
        raise UsageError(f"there are no kernels for model {config.model.name!r}")
    return found


def _chosen(setting: str, runtime: str, make: Callable[[], T]) -> T | None:
    """What the sparse runtime is, None for the dense one."""
    if runtime == "dense":
        return None
    try:
        return make()
    except UsageError as error:
        if runtime == "auto":
            return None
        raise _cannot(setting, error) from error
