"""Before a sweep starts: its paths made whole, its trials checked, its data prepared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from raysparse import space
from raysparse.config import PATHS, with_value
from raysparse.space import Sweep

Progress = Callable[[int, int], None]  # (done, total)


def placed_as(begun: Sweep, sweep: Sweep) -> Sweep:
    """The sweep with what lies on this machine where it lay when the sweep began, unless it says another place."""
    base = sweep.base
    for section, name in PATHS:
        place = (begun.base.get(section) or {}).get(name)
        if place is not None and (base.get(section) or {}).get(name) is None:
            base = with_value(base, f"{section}.{name}", place)
    return sweep.model_copy(update={"base": base})


def with_whole_paths(sweep: Sweep) -> Sweep:
    """The sweep with absolute paths, the data root among them: a trial's process works in another folder, and a resume
    may start in one."""
    from raysparse.data.prepared import default_root

    root = space.parsed_base(sweep).data.root or str(default_root())
    rooted = sweep.model_copy(update={"base": with_value(sweep.base, "data.root", root)})
    return space.with_places(rooted, lambda _, place: str(Path(place).expanduser().absolute()))


def prepare(sweep: Sweep, *, choices: bool = True, progress: Progress | None = None, **ray: Any) -> None:
    """The settings of space.tried_points checked, and what they name and the data once, before anything starts.

    UsageError: a trial that would fail. choices: False for a sweep that has begun, which goes on beside trials that
    failed by one.
    ray: as `run`; pictures are encoded on it, which starts and ends where there are any to encode.
    """
    from raysparse.sweep import encode
    from raysparse.train import plan, setup

    trials = plan.check_planned(sweep, choices=choices)
    # Of trials that differ in sparsity or optimizer alone one is enough for the rest.
    sections = {"data", "model", "first_stage", "diffusion", "train", "evaluate"}
    different = {(trial.model_dump_json(include=sections), trial.sparse.setting("teacher")): trial for trial in trials}
    for trial in different.values():
        setup.check(trial)
    options = {name: value for name, value in ray.items() if name != "num_cpus"}
    for trial in {text: trial for (text, _), trial in different.items()}.values():
        encode.prepare(trial, cpus=ray.get("num_cpus"), progress=progress, **options)
        setup.prepare_data(trial)
