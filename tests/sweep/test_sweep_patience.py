"""Storage that fails for a while, under a trial and alone."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors

from raysparse import space
from raysparse.space import Sweep
from raysparse.sweep import patience
from raysparse.sweep.trainable import train_rank
from raysparse.train import setup, state

FULL = OSError(errno.ENOSPC, "No space left on device")


def failing(work: Callable[..., Any], times: int, error: Exception = FULL) -> Callable[..., Any]:
    left = [times]

    def attempt(*arguments: Any, **options: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise error
        return work(*arguments, **options)

    return attempt


@pytest.fixture(autouse=True)
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited."""
    seconds: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", seconds.append)
    return seconds


@pytest.mark.parametrize("error", [FULL, safetensors.SafetensorError("Error while serializing: I/O error")])
def test_it_waits_longer_each_time_and_says_it_once(
    waited: list[float], capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    assert patience.patiently(failing(lambda: None, 3, error), "checkpoint of step 4", needed=False)
    assert waited == list(patience.DELAYS_S[:3])
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("checkpoint of step 4 could not be written (")


def test_in_the_end_it_goes_on_without_or_raises(waited: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    assert not patience.patiently(failing(lambda: None, 99), "checkpoint", needed=False)
    assert waited == list(patience.DELAYS_S)
    assert "goes on without it" in capfd.readouterr().err
    with pytest.raises(OSError, match="No space left"):
        patience.patiently(failing(lambda: None, 99), "report", needed=True)


@pytest.mark.parametrize("error", [ValueError("mistake"), FileExistsError(errno.EEXIST, "in the way")])
def test_what_will_not_pass_is_raised_at_once(waited: list[float], error: Exception) -> None:
    with pytest.raises(type(error)):
        patience.patiently(failing(lambda: None, 1, error), "checkpoint", needed=False)
    assert waited == []


def test_a_trial_survives_a_disk_that_fails_three_times(
    tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path, monkeypatch: pytest.MonkeyPatch, waited: list[float]
) -> None:
    trial = space.trial(sweep_of(), {"method": "static", "sparsity": 0.5})
    setup.prepare_data(trial)
    said: dict[str, list[tuple[int, float]]] = {}
    for name in ("sound", "failing"):
        folder = tmp_path / name / "trials" / trial.trial_id
        folder.mkdir(parents=True)
        (folder / "trial.json").write_text(trial.dump_json())
        steps = said.setdefault(name, [])
        told = {"trial_id": trial.trial_id, "results": str(tmp_path / name)}
        with monkeypatch.context() as disk:
            if name == "failing":
                disk.setattr(state, "save", failing(state.save, 3))
            train_rank(told, lambda metrics, steps=steps: steps.append((metrics["step"], metrics["fid"])))
    assert said["failing"] == said["sound"]
    assert [step for step, _ in said["failing"]] == [2, 4, 6, 8]
    assert [seconds for seconds in waited if seconds >= 1] == list(patience.DELAYS_S[:3])
    saved = sorted(path.name for path in (tmp_path / "failing" / "checkpoints" / trial.trial_id).iterdir())
    assert saved == ["step-000000006", "step-000000008"]
