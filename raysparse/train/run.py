"""One trial without a cluster: in this process or on N DDP workers of this machine, resumable at any time.

OUT/records/<trial_id>.parquet        the reports, rewritten after each
OUT/checkpoints/<trial_id>/step-<k>/  the latest two checkpoints
OUT/trials/<trial_id>/lock            held by the process that writes both
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from raysparse import files, results
from raysparse.config import TrialConfig
from raysparse.errors import UsageError
from raysparse.results import Facts, Outcome, Report
from raysparse.train import claims, distributed, ranks, setup, state

KEEP_CHECKPOINTS = 2  # the latest, and the one before it in case the latest is damaged on disk
OnReport = Callable[[Report], None]


def train(
    config: TrialConfig,
    out: Path,
    *,
    workers: int = 1,
    device: str = "auto",
    resume: bool = True,
    command: str = "",
    on_report: OnReport | None = None,
) -> Outcome:
    """Train one trial to its end, or on from its last checkpoint in `out`.

    device: "cpu", "cuda" (worker i takes GPU i) or "auto". resume False: start anew; what `out` holds of this trial is
    replaced. command: kept in the records. on_report: called in this process after a report is recorded; reports made
    before a resume are not repeated.
    The first Ctrl-C (or SIGTERM) saves a checkpoint at the current step and returns an Outcome in state RUNNING; a
    second one raises KeyboardInterrupt. UsageError: bad settings, damaged files, another process that trains this trial
    in `out` and does not end within 10 s. RuntimeError: a worker died.
    """
    device = ranks.checked_device(device, workers)
    config.train.share(workers)
    setup.check(config)
    setup.prepare_data(config)
    facts = setup.facts(config, sweep=out.name or "single", stage="single", world_size=workers, command=command)
    files.check_writable(out)
    outcome: Outcome = ranks.run(_work, (config, facts, out, resume), workers, device, on_report or (lambda _: None))
    return outcome


def _work(member: ranks.Member, config: TrialConfig, facts: Facts, out: Path, resume: bool) -> Outcome:
    """One rank's part."""
    # Rank 0 writes, so it has the lock: where their parent is killed the ranks go on until they notice.
    with _claimed(out, config) if member.rank == 0 else contextlib.nullcontext():
        return _trained(member, config, facts, out, resume)


def _claimed(out: Path, config: TrialConfig) -> contextlib.AbstractContextManager[None]:
    def refuse(holder: str) -> None:
        raise UsageError(
            f"{config.trial_id} is being trained in {out} by another process: {holder or 'unknown'}; wait for its end, "
            "or give another output folder"
        )

    return claims.claimed(out / "trials" / config.trial_id, refuse, ", raysparse train")


def _trained(member: ranks.Member, config: TrialConfig, facts: Facts, out: Path, resume: bool) -> Outcome:
    """Record first, then checkpoint: what a resume computes again replaces the record of its step."""
    rank, world_size = member.rank, member.world_size
    checkpoints = out / "checkpoints" / config.trial_id
    if rank == 0 and not resume:
        state.keep_latest(checkpoints, 0)
    trainer = setup.build(config, device=member.device, rank=rank, world_size=world_size)
    trainer.should_stop = member.should_stop
    # Rank 0 looks, for it also removes leftovers, and all load what it found.
    found = distributed.from_rank_0(str(state.latest(checkpoints) or "") if rank == 0 else None, world_size)
    if found:
        state.load(trainer, Path(found))
    reports = _earlier(out, config, trainer.step) if rank == 0 else []
    trainer.resume(reports)
    if rank == 0:
        files.remove_leftovers(_record(out, config))

    def record(outcome: Outcome) -> Outcome:
        if rank == 0:
            results.write_trial(out, facts, outcome, reports)
        return outcome

    def checkpoint() -> None:
        state.save(trainer, state.at_step(checkpoints, trainer.step))
        if rank == 0:
            state.keep_latest(checkpoints, KEEP_CHECKPOINTS)

    record(Outcome())
    for report in trainer.run():
        reports.append(report)
        record(Outcome())
        checkpoint()
        if rank == 0:
            member.say(report)
    if trainer.totals.reason is not None:
        return record(Outcome("FAILED", state_reason=trainer.totals.reason))
    if not trainer.finished:  # also where the evaluation of the last step was interrupted
        checkpoint()
        return record(Outcome(state_reason=f"interrupted at step {trainer.step}; the same command goes on from there"))
    return record(Outcome("COMPLETED"))


def _record(out: Path, config: TrialConfig) -> Path:
    return out / "records" / f"{config.trial_id}.parquet"


def _earlier(out: Path, config: TrialConfig, step: int) -> list[Report]:
    """Reports that were recorded up to a checkpoint's step."""
    path = _record(out, config)
    if step == 0 or not path.is_file():
        return []
    return [report for report in results.reports_of(results.read_trial(path)) if report.step <= step]
