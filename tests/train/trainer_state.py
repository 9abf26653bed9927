"""A trainer's state and reports in a form that two runs can be compared in."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from raysparse.config import TrialConfig
from raysparse.results import Report
from raysparse.train import setup, state
from raysparse.train.loop import Trainer

MEASURED = ("train_s", "compile_s", "evaluate_s", "peak_memory_bytes")  # differ from run to run


def everything(trainer: Trainer, folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a trainer's state, through its checkpoint."""
    return tensors_of(state.save(trainer, folder))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for part in state.PARTS:
        found |= {f"{part}/{k}": v for k, v in safetensors.torch.load_file(folder / f"{part}.safetensors").items()}
    return found


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def computed(report: Report) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(report).items() if k not in MEASURED}


def stopped_and_resumed(trial: TrialConfig, stop_after: int, folder: Path) -> tuple[Trainer, list[dict[str, Any]]]:
    """The second of two trainers, the first having saved itself there; what both reported, as `computed` has it."""
    first = setup.build(trial)
    first.should_stop = lambda: first.step >= stop_after
    seen = []
    for report in first.run():
        seen.append(computed(report))
        if first.step >= stop_after:
            break
    assert first.step == stop_after
    state.save(first, folder)
    second = setup.build(trial)
    state.load(second, folder)
    assert second.step == stop_after
    return second, seen + [computed(report) for report in second.run()]
