"""Checkpoints of small models without data or training: what restored, export and import are tried on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from raysparse import config, plugins, rng
from raysparse.config import TrialConfig
from raysparse.sparse.engine import SparseEngine
from raysparse.train import checks, state

LATENT_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
FIRST_STAGE = {
    "options": {
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "attention_levels": [False, False],
        "num_vq_embeddings": 32,
        "norm_num_groups": 4,
    }
}
RIGL = {"method": "rigl", "sparsity": 0.5}
STEP = 7


def trial(model: str = "latent_unet", **changes: Any) -> TrialConfig:
    """A trial of a small model; changes: dotted paths with two underscores for the dot."""
    options = json.loads(json.dumps(plugins.load("models", model).SMALL))  # lists, as a file has them
    content: dict[str, Any] = {
        "data": {"name": "hershey", "root": "/home/somebody/data", "source": "/home/somebody/raw"},
        "model": {"name": model, "options": options},
        "diffusion": LATENT_DIFFUSION,
        "evaluate": {"timestep_spacing": "original", "ddim_steps": 10},
    }
    for path, value in changes.items():
        content = config.with_value(content, path.replace("__", "."), value)
    return config.parse(content)


def save(folder: Path, trial: TrialConfig) -> Path:
    """A checkpoint of the trial at STEP, with random weights: new ones start with layers at 0 and predict nothing.

    Some active weights are 0 and -0, as training may leave them.
    """
    model = plugins.load("models", trial.model.name).build(checks.model_options(trial), seed=trial.seed)
    draw = rng.generator(trial.seed, "test")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=draw))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = trial.sparse.model_dump(exclude_none=True, exclude={"update_end_fraction"})
    engine = SparseEngine(model, optimizer, **settings, seed=trial.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in engine.masks:
                active = engine.masks[name].nonzero()
                parameter[tuple(active[0])] = 0.0
                parameter[tuple(active[-1])] = -0.0
    parts = {
        "weights": {name: tensor + 1 for name, tensor in model.state_dict().items()},  # not what is to be loaded
        "ema": model.state_dict(),
        "engine": {"engine": engine.state_dict(), "reported": {}},
        "optimizer": optimizer.state_dict(),
    }
    facts = {"trial_id": trial.trial_id, "config": trial.model_dump(mode="json"), "step": STEP}
    return state.write(folder, parts, facts)


def in_results(results: Path, trial: TrialConfig, step: int = STEP) -> Path:
    """The same where a results folder has it."""
    return save(state.at_step(results / "checkpoints" / trial.trial_id, step), trial)


def bits(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    """A state's bytes: -0 and 0 differ."""
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in state.items()}


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
