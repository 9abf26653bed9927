"""A trial's parts as plain diffusers loads them: network, scheduler, first stage, and the pipeline that joins them.

unet/               UNet2DModel or UNet2DConditionModel: the averaged weights with their exact zeros
class_embedding/    a conditional model's class vectors, the last one for no class
scheduler/          DDIMScheduler
vqvae/              the first stage; absent for a model of pixels or sketches
model_index.json    DDIMPipeline, or LDMPipeline with a first stage; absent for a conditional model, for which
                    diffusers has no pipeline
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from raysparse.config import TrialConfig
from raysparse.diffusion import ddim

MODEL_FILES = ("config.json", "diffusion_pytorch_model.safetensors")  # what save_pretrained writes
UNET = f"unet/{MODEL_FILES[1]}"
PLAIN = "model.safetensors"  # the weights of a model that diffusers does not have, under its own names
FIRST_STAGE = "vqvae"
_ONE_FILE = "1000GB"  # save_pretrained would split larger weights; masks belong to one file


def is_diffusers(model: nn.Module) -> bool:
    """Whether the network inside is diffusers' own; other models are exported as plain safetensors."""
    return hasattr(getattr(model, "unet", None), "save_pretrained")


def weight_files(model: nn.Module) -> dict[str, str]:
    """File in the folder -> prefix of its tensors' names in the model; the first is the one that masks belong to.

    Known from the model alone, so an import opens no file that a folder's text names.
    """
    if not is_diffusers(model):
        return {PLAIN: ""}
    others = [name for name, _ in model.named_children() if name != "unet"]
    return {UNET: "unet."} | {f"{name}/{PLAIN}": f"{name}." for name in others}


def save_network(model: nn.Module, folder: Path) -> None:
    """Write the files of `weight_files`; every number of the model's state is in one of them."""
    from safetensors.torch import save_file

    state = model.state_dict()
    for file, prefix in weight_files(model).items():
        own = [name for name in state if name.startswith(prefix)]
        # copies: safetensors refuses tensors that share memory, such as cuDNN's flat GRU weights
        tensors = {name.removeprefix(prefix): state.pop(name).to("cpu", copy=True).contiguous() for name in own}
        (folder / file).parent.mkdir(exist_ok=True)
        if file == UNET:
            _unet(model).save_pretrained(folder / "unet", safe_serialization=True, max_shard_size=_ONE_FILE)
        else:
            save_file(tensors, folder / file, metadata={"format": "pt"})
    assert not state, f"not exported: {', '.join(state)}"


def save_first_stage(first_stage: nn.Module, folder: Path) -> None:
    """Write diffusers' VQModel, for whichever network: an import needs it."""
    first_stage.save_pretrained(  # type: ignore[operator]  # a diffusers model
        folder / FIRST_STAGE, safe_serialization=True, max_shard_size=_ONE_FILE
    )


def save_pipeline(config: TrialConfig, folder: Path, unet: str, latent: bool) -> None:
    """Write scheduler and, for an unconditional model, model_index.json."""
    scheduler(config).save_pretrained(folder / "scheduler")
    if pipeline := pipeline_of(unet, latent):
        index = {
            "_class_name": pipeline,
            "_diffusers_version": importlib.metadata.version("diffusers"),
            "scheduler": ["diffusers", "DDIMScheduler"],
            "unet": ["diffusers", unet],
        }
        if latent:
            index[FIRST_STAGE] = ["diffusers", "VQModel"]
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model_index.json").write_text(text, encoding="utf-8")


def pipeline_of(unet: str, latent: bool) -> str | None:
    """diffusers' pipeline for a network's class. None: it has none."""
    if unet != "UNet2DModel":
        return None
    return "LDMPipeline" if latent else "DDIMPipeline"


def unet_class(model: nn.Module) -> str:
    return type(_unet(model)).__name__


def scheduler(config: TrialConfig) -> Any:
    """DDIMScheduler with the trial's noise levels and, at the step counts of `equal_steps`, exactly its steps.

    PAPER: Latent Diffusion gives the settings for the original's timesteps: they begin at 1, and the last step goes to
    the noise level of t = 0. Ours otherwise end at 0 and go to a noise level of 0.
    """
    from diffusers import DDIMScheduler

    settings, original = config.evaluate, config.evaluate.timestep_spacing == "original"
    first = ddim.timesteps(config.diffusion.timesteps, settings.ddim_steps, spacing="original")[-1] if original else 0
    return DDIMScheduler(
        num_train_timesteps=config.diffusion.timesteps,
        beta_start=config.diffusion.beta_start,
        beta_end=config.diffusion.beta_end,
        beta_schedule=config.diffusion.beta_schedule,
        clip_sample=False,
        set_alpha_to_one=not original,
        steps_offset=first,
        timestep_spacing="trailing" if settings.timestep_spacing == "trailing" else "leading",
        prediction_type="epsilon",
    )


def equal_steps(config: TrialConfig) -> list[int]:
    """The step counts at which diffusers' scheduler visits the timesteps that ours does; their weights then agree too.

    Found by asking it: diffusers rounds T / steps down, so they are the divisors of T and few others.
    """
    total, spacing = config.diffusion.timesteps, config.evaluate.timestep_spacing
    theirs = copy.deepcopy(scheduler(config))
    equal = []
    for steps in range(1, total + 1):
        theirs.set_timesteps(steps)
        times = theirs.timesteps.tolist()
        following = [time - total // steps for time in times]  # as its `step` has it; below 0 is the end
        ours = ddim.timesteps(total, steps, spacing=spacing)
        if times == ours and following[:-1] == ours[1:] and following[-1] < 0:
            equal.append(steps)
    return equal


def mask_names(masks: Mapping[str, Tensor], model: nn.Module) -> dict[str, str]:
    """Parameter name -> name in the first weights file."""
    prefix = next(iter(weight_files(model).values()))
    assert all(name.startswith(prefix) for name in masks)
    return {name: name.removeprefix(prefix) for name in masks}


def _unet(model: nn.Module) -> Any:
    return model.unet
