"""kill -9 in the middle of a topology update and of a checkpoint: what is on disk is whole, and goes on bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from trainer_state import assert_same, tensors_of

from raysparse import config
from raysparse.sparse import optimizer_state, pattern
from raysparse.train import run, state


def die_at(place: Any, name: str, call: int) -> None:
    """The process ends where this function is called for the `call`-th time."""
    function, calls = getattr(place, name), []

    def replaced(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    setattr(place, name, replaced)


# The trial has 6 masked weights; updates at steps 3, 6 and 9, checkpoints at 4, 8 and 12. From the
# second update on there is a checkpoint to go back to.
DEATHS: dict[str, tuple[int, Callable[[int], None]]] = {
    "between prune and grow": (4, lambda layers: die_at(pattern.Pattern, "grown", layers + 2)),
    "between two layers": (4, lambda layers: die_at(optimizer_state.Undo, "zero", layers + 2)),
    "between two files": (4, lambda layers: die_at(safetensors.torch, "save", 7)),
    "before the rename": (4, lambda layers: die_at(state, "_move_onto", 2)),
    "as an old one is removed": (12, lambda layers: die_at(shutil, "rmtree", 1)),
}


def _train(trial_json: str, out: Path, death: str, layers: int) -> None:
    DEATHS[death][1](layers)
    run.train(config.parse(json.loads(trial_json)), out, device="cpu")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Filled by the first test: its fixtures are a function's."""
    return {"out": tmp_path_factory.mktemp("undisturbed")}


@pytest.mark.slow
@pytest.mark.parametrize("death", DEATHS)
def test_what_is_on_disk_is_whole_and_goes_on_bit_for_bit(tiny, rigl, tmp_path, undisturbed, death):
    trial = tiny(rigl)
    if "tensors" not in undisturbed:
        run.train(trial, undisturbed["out"], device="cpu")
        last = state.latest(undisturbed["out"] / "checkpoints" / trial.trial_id)
        undisturbed["tensors"] = tensors_of(last)
    layers = sum(name.startswith("engine/engine.engine.masks") for name in undisturbed["tensors"])
    assert layers > 1

    context = multiprocessing.get_context("forkserver")  # torch is imported once for all deaths
    context.set_forkserver_preload(["raysparse.train.run", "raysparse.train.setup"])
    process = context.Process(target=_train, args=(trial.dump_json(), tmp_path, death, layers))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL

    checkpoints = tmp_path / "checkpoints" / trial.trial_id
    left = [path.name for path in checkpoints.glob(f"{state.TEMPORARY}*")]
    assert bool(left) == ("update" not in death and "prune" not in death and "layers" not in death)
    whole = state.latest(checkpoints)
    assert whole is not None
    assert state.manifest(whole)["step"] == DEATHS[death][0]
    assert not list(checkpoints.glob(f"{state.TEMPORARY}*"))
    assert run.train(trial, tmp_path, device="cpu").state == "COMPLETED"
    assert_same(tensors_of(state.latest(checkpoints)), undisturbed["tensors"])
