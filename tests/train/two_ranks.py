"""Two ranks of a trial on gloo, each a process of its own."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path

from raysparse import config
from raysparse.config import TrialConfig
from raysparse.train import distributed

Work = Callable[[int, TrialConfig, Path], None]  # rank, trial, folder; a function of a module


def on_two_ranks(work: Work, trial: TrialConfig, folder: Path) -> None:
    """Both must do their work without an error, in two minutes."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(work, rank, trial.dump_json(), folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]


def _rank(work: Work, rank: int, trial_json: str, folder: Path) -> None:
    distributed.init(rank, 2, f"file://{folder}/rendezvous", "cpu")
    work(rank, config.parse(json.loads(trial_json)), folder)
    distributed.cleanup()
    distributed.end_process()
