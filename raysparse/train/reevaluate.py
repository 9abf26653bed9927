"""Evaluate models that are already trained, under other protocols: the paper's study of sampling steps (its Table 8).

RESULTS/evaluations/<trial_id>-<hash of what was asked>.parquet: the trial's records with the new FID, KID and protocol
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from raysparse import config as configs
from raysparse import results
from raysparse.config import EvaluateConfig, TrialConfig
from raysparse.errors import UsageError
from raysparse.files import atomic_path, check_writable
from raysparse.results import Facts, Outcome, Report
from raysparse.train import costs, ranks, restored, setup

FOLDER = "evaluations"
# What an evaluation may choose anew; the rest of a trial is what was trained.
CHANGEABLE = ("evaluate.", "data.source", "data.root", "first_stage.weights")


@dataclasses.dataclass(frozen=True)
class Row:
    """One model under one protocol."""

    trial_id: str
    checkpoint: str
    method: str
    sparsity: float
    seed: int
    step: int
    ddim_steps: int  # asked for
    network_calls: int  # for one sample: DDIM steps as they are done, twice with guidance
    validation_loss: float
    fid: float
    kid: float
    kid_std: float
    protocol: str  # JSON
    samples_png: bytes | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: all but the picture."""
        fields = dataclasses.asdict(self) | {"protocol": json.loads(self.protocol)}
        del fields["samples_png"]
        return fields


def evaluate(
    checkpoint: Path,
    variants: Sequence[Mapping[str, Any]],
    *,
    workers: int = 1,
    threads: int | None = None,
    device: str = "auto",
    again: bool = False,
    command: str = "",
    on_row: Callable[[Row], None] = lambda _: None,
) -> list[Row]:
    """Evaluate one checkpoint's averaged model under each variant: {dotted path: value} over the trial's settings.

    The samples are shared by the workers (ranks on this machine). threads: of each on the CPU; None: PyTorch's, shared
    by the workers. What RESULTS/evaluations has already is not measured again unless `again`. on_row: called
    in this process as each is done. An interrupt (see ranks.run) ends it: then there are fewer rows than variants.
    UsageError: a setting that is not an evaluation's, an unknown or damaged checkpoint. RuntimeError: a worker died.
    """
    device = ranks.checked_device(device, workers)
    model = restored.load(checkpoint)
    trials = [changed(model.config, variant) for variant in variants]
    for trial in trials:
        setup.check_evaluation(trial)
        setup.prepare_data(trial)
    out = _results_of(model.folder)
    asked = [(_asked(trial, protocol := setup.protocol(trial).json()), protocol, trial) for trial in trials]
    rows: dict[str, Row] = {}
    if out is not None and not again:
        rows = {text: row for text, protocol, trial in asked if (row := _known(out, model, trial, protocol))}
    for row in rows.values():
        on_row(row)

    def heard(message: tuple[Row, TrialConfig]) -> None:
        row, trial = message
        if out is not None:
            _record(out, row, trial, workers, command)
        rows[_asked(trial, row.protocol)] = row
        on_row(row)

    open_trials = list({text: trial for text, _, trial in asked if text not in rows}.values())
    if open_trials:
        if out is not None:  # refused now rather than after an hour of sampling
            check_writable(out / FOLDER)
        ranks.run(_work, (model.folder, open_trials, threads), workers, device, heard)
    return [rows[text] for text, _, _ in asked if text in rows]


def write_pictures(rows: Sequence[Row], folder: Path) -> None:
    """FOLDER/<trial_id>-step<k>-ddim<n>.png: the sheet of samples of each row."""
    for row in rows:
        if row.samples_png is not None:
            with atomic_path(folder / f"{row.trial_id}-step{row.step}-ddim{row.ddim_steps}.png") as temporary:
                temporary.write_bytes(row.samples_png)


def changed(trial: TrialConfig, changes: Mapping[str, Any]) -> TrialConfig:
    """The trial with other settings of its evaluation. UsageError for a setting that decides what was trained."""
    content = configs.with_value(trial.model_dump(mode="json"), "evaluate.intermediate", None)  # that was training's
    for path, value in changes.items():
        if not path.startswith(CHANGEABLE):
            raise UsageError(
                f"{path} belongs to what was trained and cannot be changed for an evaluation; these can: "
                + ", ".join(f"{name}*" if name.endswith(".") else name for name in CHANGEABLE)
            )
        content = configs.with_value(content, path, value)
    return configs.parse(content, f"evaluation of {trial.trial_id}")


def _work(member: ranks.Member, checkpoint: Path, trials: Sequence[TrialConfig], threads: int | None) -> None:
    """One rank's part: all variants, told one by one."""
    torch.set_num_threads(threads or max(1, torch.get_num_threads() // member.world_size))
    model = restored.load(checkpoint, member.device)
    for trial in trials:
        evaluator = setup.evaluator(trial, device=member.device, rank=member.rank, world_size=member.world_size)
        found = evaluator.evaluate(model.network, member.should_stop)
        if found is None:
            return  # interrupted
        if member.rank != 0:
            continue
        if found.wrong is not None:
            raise UsageError(f"{checkpoint}: {found.wrong}; this model cannot be evaluated")
        assert found.fid is not None
        assert found.kid is not None
        assert found.kid_std is not None
        row = _row(model, trial, found.validation_loss, found.fid, found.kid, found.kid_std, evaluator.protocol.json())
        member.say((dataclasses.replace(row, samples_png=found.samples_png), trial))


def _row(
    model: restored.Restored, trial: TrialConfig, loss: float, fid: float, kid: float, kid_std: float, protocol: str
) -> Row:
    return Row(
        trial_id=model.trial_id,
        checkpoint=str(model.folder),
        method=trial.sparse.method,
        sparsity=trial.sparse.sparsity or 0.0,
        seed=trial.seed,
        step=model.step,
        ddim_steps=trial.evaluate.ddim_steps,
        network_calls=costs.evaluations(trial),
        validation_loss=loss,
        fid=fid,
        kid=kid,
        kid_std=kid_std,
        protocol=protocol,
    )


def _results_of(checkpoint: Path) -> Path | None:
    """RESULTS of RESULTS/checkpoints/<trial>/step-<k> where it has the trial's records, else None."""
    place = checkpoint.resolve()
    if len(place.parents) < 3:
        return None
    out = place.parents[2]
    has = place.parents[1].name == "checkpoints" and (out / "records" / f"{place.parent.name}.parquet").is_file()
    return out if has else None


def _asked(trial: TrialConfig, protocol: str) -> str:
    """All that decides what is measured: the protocol, and beside it the precision and the validation examples."""
    count = trial.evaluate.validation_examples
    beside = [trial.sampling_precision] if trial.sampling_precision != "fp32" else []
    beside += [f"validation {count}"] if count != EvaluateConfig.model_fields["validation_examples"].default else []
    return " ".join([protocol, *beside])


def _path(out: Path, trial: TrialConfig, trial_id: str, protocol: str) -> Path:
    """One file for each that may be asked."""
    digest = hashlib.sha256(_asked(trial, protocol).encode()).hexdigest()
    return out / FOLDER / f"{trial_id}-{digest[:10]}.parquet"


def _reports(path: Path) -> list[Report]:
    return results.reports_of(results.read_trial(path)) if path.is_file() else []


def _known(out: Path, model: restored.Restored, trial: TrialConfig, protocol: str) -> Row | None:
    """What an earlier evaluation of this step with these settings found; None where there was none."""
    for report in _reports(_path(out, trial, model.trial_id, protocol)):
        loss, fid, kid, kid_std = report.validation_loss, report.fid, report.kid, report.kid_std
        if report.step == model.step and loss is not None and fid is not None:
            assert kid is not None
            assert kid_std is not None
            row = _row(model, trial, loss, fid, kid, kid_std, protocol)
            return dataclasses.replace(row, samples_png=report.samples_png)
    return None


def _record(out: Path, row: Row, trial: TrialConfig, workers: int, command: str) -> None:
    """Keep a row as a record: the trial's own report of that step with the new measurements in it."""
    trained = _reports(out / "records" / f"{row.trial_id}.parquet")
    before = next((report for report in trained if report.step == row.step), None)
    if before is None:
        return  # a checkpoint between two reports: nothing is known of its times and losses
    measured = {name: getattr(row, name) for name in ("validation_loss", "fid", "kid", "kid_std", "samples_png")}
    report = dataclasses.replace(before, intermediate_fid=None, **measured)
    facts: Facts = dataclasses.replace(
        setup.facts(trial, sweep=out.name, stage="single", world_size=workers, command=command), trial_id=row.trial_id
    )
    path = _path(out, trial, row.trial_id, row.protocol)
    results.write_table(path, facts, Outcome("COMPLETED"), [*_reports(path), report])
