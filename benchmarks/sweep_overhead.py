"""What a sweep takes from its trials: the same training loop inside a sweep and alone, turn by turn.

    python benchmarks/sweep_overhead.py                          # quickstart.yaml's model, about three minutes
    python benchmarks/sweep_overhead.py --space kanjivg_small --steps 300 --data kanji.rdp100.npz

One sweep runs its trials one at a time, on a Ray of its own. After each, while the driver waits, the same trial runs
alone: the same loop in a process without Ray, which neither reports nor saves. A ratio is of two runs of one turn, the
first turn is left out (files and imports are cold). Rows:

    steps/s, of training   optimizer steps over the seconds spent in them
    steps/s, with the rest over all seconds from the first step to the last report: evaluation, which both do, and in
                           the sweep reports, samples and a checkpoint at each
    next trial, s          from a free slot (the driver has heard of a trial's end) to the next one's first step
    memory, MB             of the trial's process: its own pages plus its share of the others (PSS), and its peak (RSS)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from raysparse import config as configs
from raysparse import results as records
from raysparse import space
from raysparse.space import Sweep
from raysparse.sweep import leaving
from raysparse.sweep.journal import Event

SPACES = Path(__file__).resolve().parents[1] / "tune_spaces"
MB = 10**6


@dataclasses.dataclass
class Turn:
    """One trial in the sweep, and alone."""

    train_s: float = 0.0
    whole_s: float = 0.0  # from before its first step to its last report
    next_s: float | None = None  # None: the first trial
    pss_bytes: int = 0
    peak_bytes: int = 0
    alone: dict[str, float] = dataclasses.field(default_factory=dict)  # train_s, whole_s, peak_bytes


class Watch:
    """The sweep's `on_event`: it notes times, and runs a trial alone after its end."""

    def __init__(self, results: Path) -> None:
        self.turns: dict[str, Turn] = {}
        self._results, self._free_at, self._first_step_at = results, 0.0, {}

    def __call__(self, item: Event) -> None:
        name = item.trial_id or ""
        trial = self._results / "trials" / name
        if item.kind in ("report", "completed") and name not in self.turns:
            turn = self.turns[name] = Turn()
            # Written when everything is built and loaded, just before the first step.
            self._first_step_at[name] = (trial / leaving.STARTS).stat().st_mtime
            turn.next_s = self._first_step_at[name] - self._free_at if self._free_at else None
            turn.pss_bytes = pss_bytes(int((trial / "lock").read_text().split()[0]))
        if item.kind == "completed":
            self.turns[name].whole_s = item.time - self._first_step_at[name]
            command = [sys.executable, __file__, "--alone", str(trial / "trial.json")]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            self.turns[name].alone = json.loads(done.stdout)
            self._free_at = time.time()


def pss_bytes(process: int) -> int:
    """Proportional set size of a process of this machine."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


def alone(path: Path) -> dict[str, float]:
    """The loop of a trial without Ray, in this process."""
    from raysparse.train import setup

    trainer = setup.build(configs.parse(json.loads(path.read_text())))
    begun = time.perf_counter()
    for _ in trainer.run():
        pass
    whole_s = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"train_s": trainer.totals.train_s, "whole_s": whole_s, "peak_bytes": peak}


def sweep_of(name: str, trials: int, steps: int, every: int, data: Path | None) -> Sweep:
    """Trials that do the same work: they differ in a learning rate that changes nothing about their time."""
    changes: dict[str, Any] = {"base.train.steps": steps, "base.evaluate.every_steps": every, "search": None}
    changes |= {"asha": None, "confirm": None, "resources.max_concurrent": 1}
    changes |= {"base.data.source": str(data)} if data else {}
    rates = [round(1e-3 + 1e-6 * number, 9) for number in range(trials)]
    changes["grid"] = {"dense": {"optimizer.lr": rates[:1]}, "rigl": {"sparsity": [0.5], "optimizer.lr": rates[1:]}}
    return space.load(SPACES / f"{name}.yaml", changes)


def measure(sweep: Sweep, ray: dict[str, Any]) -> list[Turn]:
    """Run the sweep; a Turn per trial."""
    from raysparse.sweep import tuner

    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "sweep"
        watch = Watch(results.absolute())
        summary = tuner.run(sweep, results, command="benchmark", on_event=watch, **ray)
        if summary.failed or summary.interrupted:
            raise SystemExit(f"not measured: {[row.reason for row in summary.failed] or summary.limit}")
        for name, turn in watch.turns.items():
            last = records.reports_of(records.read_trial(results / "records" / f"{name}.parquet"))[-1]
            turn.train_s, turn.peak_bytes = last.train_s, last.peak_memory_bytes or 0
    return list(watch.turns.values())


def table(turns: Sequence[Turn], steps: int) -> list[dict[str, Any]]:
    """A row per figure: median, least and most, of the sweep, alone, and of their ratio turn by turn."""

    def row(figure: str, inside: Sequence[float], outside: Sequence[float] = ()) -> dict[str, Any]:
        ratios = [a / b for a, b in zip(inside, outside, strict=True)] if outside else []
        found = {"sweep": inside, "alone": outside, "ratio": ratios}
        return {"figure": figure} | {
            name: [statistics.median(values), min(values), max(values)] if values else None
            for name, values in found.items()
        }

    return [
        row("steps/s, of training", [steps / t.train_s for t in turns], [steps / t.alone["train_s"] for t in turns]),
        row("steps/s, with the rest", [steps / t.whole_s for t in turns], [steps / t.alone["whole_s"] for t in turns]),
        row("next trial, s", [t.next_s for t in turns if t.next_s is not None]),
        row("memory (PSS), MB", [t.pss_bytes / MB for t in turns]),
        row("memory (peak RSS), MB", [t.peak_bytes / MB for t in turns], [t.alone["peak_bytes"] / MB for t in turns]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--space", default="quickstart", help="a shipped sweep file's name, whose base is trained")
    parser.add_argument("--data", type=Path, help="its raw data")
    parser.add_argument("--trials", type=int, default=8, help="turns, one more than count")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=200, help="steps between two evaluations")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--alone", type=Path, metavar="TRIAL.JSON", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(alone(options.alone)))
        return
    sweep = sweep_of(options.space, options.trials, options.steps, options.every, options.data)
    rows = table(measure(sweep, {"num_cpus": 1})[1:], options.steps)
    if options.json:
        print(json.dumps(rows))
        return
    print("| figure | in a sweep | alone | ratio |\n|---|---|---|---|")
    for row in rows:
        cells = [f"{v[0]:.3g} ({v[1]:.3g} to {v[2]:.3g})" if (v := row[name]) else "" for name in list(row)[1:]]
        print(f"| {' | '.join([row['figure'], *cells])} |")


if __name__ == "__main__":
    main()
