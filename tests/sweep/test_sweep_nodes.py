"""A cluster of three nodes that loses one, and one that is told that its machine is taken away."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from driven import files, process_of

from raysparse import space
from raysparse.space import Sweep
from raysparse.sweep import preparing, tuner
from raysparse.sweep.journal import Event, read
from raysparse.train import run, state

STEPS, EVERY = 1200, 300  # a trial looks for a notice every 5 s
SMALL_MEMORY = 100_000_000  # bytes of object store per node


class Nodes:
    """A head without work and two workers, processes of this machine."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        small = {"object_store_memory": SMALL_MEMORY, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
        for _ in range(2):
            self.add()

    def add(self) -> None:
        self.cluster.add_node(num_cpus=1, object_store_memory=SMALL_MEMORY)

    def of(self, process: int) -> Any:
        """The node that a worker process lies on: its raylet is the parent."""
        parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        (found,) = [node for node in self.cluster.worker_nodes if raylet(node) == parent]
        return found


def raylet(node: Any) -> int:
    (info,) = node.all_processes["raylet"]
    return int(info.process.pid)


@pytest.fixture
def nodes(ray_home: Path) -> Iterator[Nodes]:
    found = Nodes()
    yield found
    found.cluster.shutdown()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trial_goes_on_elsewhere_when_its_node_is_lost_or_drained(
    tmp_path: Path, sweep_of: Callable[..., Sweep], nodes: Nodes
) -> None:
    grid = {"rigl": {"sparsity": [0.5], "prune_ratio": [0.5], "update_interval": [100]}}
    base: dict[str, Any] = sweep_of().base
    base |= {"train": {"steps": STEPS, "batch_size": 8}, "evaluate": base["evaluate"] | {"every_steps": EVERY}}
    sweep = sweep_of(base=base, search=None, grid=grid, asha=None, confirm=None, resources={"max_concurrent": 1})
    out = tmp_path / "out"
    dense, rigl = (space.trial(sweep, point).trial_id for point in space.grid_points(sweep))
    struck: list[str] = []

    def on_event(item: Event) -> None:
        if item.kind != "report" or item.step != EVERY or item.trial_id in struck:
            return
        struck.append(str(item.trial_id))
        process = int((out / "trials" / struck[-1] / "lock").read_text().split()[0])
        node = nodes.of(process)
        if item.trial_id == dense:  # the machine is gone, all at once
            os.kill(raylet(node), signal.SIGKILL)
            os.kill(process, signal.SIGKILL)
            nodes.add()
        else:  # a cloud's notice
            drain = ["drain-node", "--address", nodes.cluster.address, "--node-id", node.node_id]
            drain += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
            drain += ["--deadline-remaining-seconds", "60"]
            subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *drain], check=True, capture_output=True)

    summary = tuner.run(sweep, out, command="", on_event=on_event, address=nodes.cluster.address)
    assert struck == [dense, rigl]
    assert {row.state for row in summary.board.rows.values()} == {"COMPLETED"}, [
        row.reason for row in summary.board.rows.values()
    ]
    notes = {item.trial_id: str(item.reason) for item in read(out / "journal.jsonl") if item.kind == "note"}
    assert went_on(out, dense) == [EVERY]
    assert notes[dense].startswith("its process was lost: ")
    assert len(notes[dense]) < 200, "no RPC codes"
    (step,) = went_on(out, rigl)
    assert step > EVERY, "saved just in time, after its last report"
    assert notes[rigl] == f"its node is being taken away; saved at step {step}; started again"

    for trial in (space.trial(preparing.with_whole_paths(sweep), point) for point in space.grid_points(sweep)):
        run.train(trial, tmp_path / "alone", device="cpu")
        found = [state.latest(place / "checkpoints" / trial.trial_id) for place in (out, tmp_path / "alone")]
        assert files(found[0]) == files(found[1]), "bit for bit what an undisturbed run makes"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trial_of_two_workers_goes_on_when_the_node_of_one_is_lost(
    tmp_path: Path, sweep_of: Callable[..., Sweep], nodes: Nodes
) -> None:
    base: dict[str, Any] = sweep_of().base
    base |= {"train": {"steps": 120, "batch_size": 8}, "evaluate": base["evaluate"] | {"every_steps": 40}}
    grid: dict[str, Any] = {"dense": {}}
    sweep = sweep_of(base=base, search=None, grid=grid, asha=None, confirm=None, resources={"workers": 2})
    out = tmp_path / "out"
    trial = space.trial(preparing.with_whole_paths(sweep), {"method": "dense"})
    struck: list[int] = []

    def on_event(item: Event) -> None:
        if item.kind == "report" and item.step == 40 and not struck:
            struck.append(process_of(out, trial.trial_id, 1))
            node = nodes.of(struck[0])
            os.kill(raylet(node), signal.SIGKILL)
            os.kill(struck[0], signal.SIGKILL)
            nodes.add()

    summary = tuner.run(sweep, out, command="", on_event=on_event, address=nodes.cluster.address)
    (row,) = summary.board.rows.values()
    assert (row.state, sorted(row.fids)) == ("COMPLETED", [40, 80, 120])
    notes = [str(item.reason) for item in read(out / "journal.jsonl") if item.kind == "note"]
    # Where Ray had put the trial's own process, which needs no core, on that node too, it tells of the rank and is lost
    # itself, or is lost before it tells.
    lost = r"rank \d was lost: .*|a rank was lost: the others .*|its process was lost: neither it nor its node answers"
    assert 1 <= len(notes) <= 2, notes
    assert all(re.match(rf"({lost}); started again$", note) for note in notes), notes
    steps = went_on(out, trial.trial_id)
    assert steps, "it was started again"
    assert set(steps) <= {40, 80}, "of a report, which ranks may have passed before the driver has heard of it"
    run.train(trial, tmp_path / "alone", workers=2, device="cpu")
    found = [state.latest(place / "checkpoints" / trial.trial_id) for place in (out, tmp_path / "alone")]
    assert files(found[0]) == files(found[1]), "bit for bit what an undisturbed run makes"


def went_on(out: Path, trial_id: str) -> list[int]:
    """The steps from which the trial was started again."""
    text = (out / "trials" / trial_id / "log.txt").read_text()
    return [int(step) for step in re.findall(r"goes on from step (\d+)", text)]
