"""Records of trials that never ran, for what reads seconds and learning curves from them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

from raysparse.config import TrialConfig
from raysparse.results import Facts, Outcome, Report, write_trial


def record(folder: Path, trial: TrialConfig, fids: dict[int, float], state: str, **changes: Any) -> Path:
    """A trial with these FIDs; 0.5 s a step, 3 s an evaluation."""
    empty = {int: 1, float: 1.0, str: ""}
    hints = get_type_hints(Facts)
    values = {field.name: empty.get(hints[field.name]) for field in dataclasses.fields(Facts)}
    values |= {
        "trial_id": trial.trial_id,
        "stage": "search",
        "method": trial.sparse.method,
        "total_steps": trial.train.steps,
        "config": trial.dump_json(),
        **changes,
    }
    reports = []
    for count, (step, fid) in enumerate(fids.items(), start=1):
        known = {
            "step": step, "fid": fid, "density": 1.0, "layer_density": "{}", "topology_updates": 0,
            "topology_changed": 0.0,
            "train_s": 0.5 * step, "evaluate_s": 3.0 * count, "flops_spent_paper": 1.0, "flops_spent_true": 1.0,
        }  # fmt: skip
        names = ("train_loss", "validation_loss", "kid", "kid_std", "peak_memory_bytes")
        reports.append(Report(**known, **dict.fromkeys(names)))
    stopped = max(fids) if state == "STOPPED" else None
    return write_trial(folder, Facts(**values), Outcome(state=state, stopped_at_step=stopped), reports)
