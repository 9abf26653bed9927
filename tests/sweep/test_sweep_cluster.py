"""What fits on which nodes, by our count and by Ray's."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raysparse import space
from raysparse.errors import UsageError
from raysparse.space import Resources, Sweep
from raysparse.sweep import cluster, trainable, tuner
from raysparse.sweep.cluster import Shortage, _check_fits


@pytest.mark.parametrize(
    ("nodes", "resources", "trials"),
    [
        ([{"CPU": 2}], Resources(), 2),
        ([{"CPU": 2}], Resources(cpus_per_worker=0.5), 4),
        ([{"CPU": 2}], Resources(workers=2), 1),
        ([{"CPU": 3}, {"CPU": 3}], Resources(cpus_per_worker=2), 2),  # a worker lies on one node
        ([{"CPU": 3}, {"CPU": 3}], Resources(workers=2, cpus_per_worker=2), 1),  # a trial's workers on any
        ([{"CPU": 16, "GPU": 2}], Resources(gpus_per_worker=1), 2),
        ([{"CPU": 16, "GPU": 1}], Resources(gpus_per_worker=0.25), 4),
        ([{"CPU": 16, "GPU": 2}], Resources(gpus_per_worker=2), 1),
        ([{"CPU": 16, "GPU": 2}], Resources(gpus_per_worker=0.4), 4),  # a share lies on one GPU
        ([{"CPU": 16, "GPU": 1}], Resources(gpus_per_worker=1 / 7), 7),  # as Ray counts: .1428
        ([{"CPU": 16, "GPU": 1}], Resources(gpus_per_worker=0.1429), 6),
        ([{"CPU": 2, "GPU": 8}, {"CPU": 0}], Resources(gpus_per_worker=1), 2),
        ([{"CPU": 2}], Resources(cpus_per_worker=0.1), 20),
    ],
)
def test_as_many_trials_as_fit(nodes: list[dict[str, float]], resources: Resources, trials: int) -> None:
    assert _check_fits(nodes, resources, "here") == trials


@pytest.mark.ray
@pytest.mark.slow
def test_ray_counts_shares_of_a_gpu_as_we_do(tmp_path: Path, ray_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 2}')  # Ray takes our word for them
    shares = {0.125: 16, 1 / 7: 14, 0.1429: 12, 0.4: 4}
    with cluster.ray_for(tmp_path, Resources(), num_cpus=20, temp_dir=ray_home):
        from ray.util import placement_group, placement_group_table, remove_placement_group

        for share, expected in shares.items():
            resources = Resources(gpus_per_worker=share)
            assert cluster.concurrency(resources) == expected
            asked = [placement_group([{"CPU": 1, "GPU": share}]) for _ in range(expected + 1)]

            def there(asked: list[Any] = asked) -> int:
                return sum(placement_group_table(one)["state"] == "CREATED" for one in asked)

            deadline = time.monotonic() + 60
            while there() < expected and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.5)  # one more would be there by then
            assert there() == expected
            for one in asked:
                remove_placement_group(one)


@pytest.mark.ray
@pytest.mark.slow
def test_eight_trials_at_an_eighth_of_a_gpu_run_at_once(
    tmp_path: Path, sweep_of: Callable[..., Sweep], ray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits until all eight have begun; what they would train needs a real GPU and is left out."""

    def meet(config: dict[str, Any]) -> None:
        import os
        import time
        from pathlib import Path

        from ray import tune

        folder = Path(config["results"]) / "met"
        folder.mkdir(exist_ok=True)
        (folder / config["trial_id"]).write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        deadline = time.monotonic() + 200
        while len(list(folder.iterdir())) < 8 and time.monotonic() < deadline:
            time.sleep(0.1)
        tune.report({"step": 0, "fid": None, "failed": f"{len(list(folder.iterdir()))} met"})

    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 1}')
    monkeypatch.setattr(trainable, "train", meet)
    grid = {"dense": {}, "static": {"sparsity": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]}}
    shared = {"cpus_per_worker": 0.25, "gpus_per_worker": 0.125}
    sweep = sweep_of(search=None, asha=None, confirm=None, grid=grid, resources=shared)
    summary = tuner.run(sweep, tmp_path / "out", command="", num_cpus=2, temp_dir=ray_home)
    assert [row.reason for row in summary.failed] == ["8 met"] * space.trial_count(sweep)
    assert {path.read_text() for path in (tmp_path / "out" / "met").iterdir()} == {"0"}, "all on one GPU"


def test_what_is_missing_is_said() -> None:
    with pytest.raises(UsageError, match=r"needs 4 workers x 1 CPUs, but this machine has 2 CPUs, room for 2 such"):
        _check_fits([{"CPU": 2}], Resources(workers=4), "this machine")
    with pytest.raises(UsageError, match=r"1 worker x 1 CPUs and 1 GPUs, but the cluster has 8 CPUs and 0 GPUs"):
        _check_fits([{"CPU": 8}], Resources(gpus_per_worker=1), "the cluster")


def test_a_cluster_that_lost_its_nodes_is_said_once_and_so_is_the_end_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, now = [{"CPU": 0.0}, {"CPU": 1.0}], [0.0]
    monkeypatch.setattr(cluster.time, "monotonic", lambda: now[0])
    shortage = Shortage(Resources(), lambda: list(nodes))
    assert shortage() is None
    lost = nodes.pop()
    said = []
    for now[0] in range(0, 100, 10):
        said.append(shortage())
    assert said[:2] == [None, None]  # another machine may be on its way
    assert said[2] == (
        "no trial can run: one trial needs 1 worker x 1 CPUs, but the cluster of 1 node has 0 CPUs, room for 0 such "
        "workers; waiting for nodes to join (`ray status` shows what is asked for)"
    )
    assert not any(said[3:])
    nodes.append(lost)
    assert shortage() == "there is room for trials again"
    assert shortage() is None


def test_a_local_ray_that_was_lost_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(cluster.time, "monotonic", lambda: now[0])
    local = Shortage(Resources(), list, lambda: False)
    joined = Shortage(Resources(), list, lambda: True)
    assert (local(), joined()) == (None, None)
    now[0] = cluster.SHORT_S
    assert "the cluster of 0 nodes" in (joined() or ""), "its nodes may come back"
    go_on = rf"Ray of this machine was lost .*; go on with: raysparse resume {tmp_path}$"
    with pytest.raises(UsageError, match=go_on), tuner._in_words(tmp_path):
        local()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            Exception("The current node timed out.\nIts load may be why."),
            "this machine: The current node timed out; try",
        ),
        (TimeoutError(), "this machine: TimeoutError; try again"),
        (ConnectionError("nobody"), "cannot start or reach Ray at 'local': nobody"),
    ],
)
def test_a_local_ray_that_does_not_start_is_said_in_words(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: Any) -> None:
        raise error

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(cluster, "ENVIRONMENT", {})
    monkeypatch.setattr(cluster, "make_token", lambda: None)
    with pytest.raises(UsageError, match=said), cluster.ray_for(tmp_path, Resources(), address="local"):
        pass


def test_a_process_that_ray_killed_for_memory_is_a_lost_one() -> None:
    from ray.air.execution._internal.actor_manager import RayActorManager
    from ray.exceptions import OutOfMemoryError, RayActorError

    heard: list[Exception] = []
    actor = SimpleNamespace(actor_id=1, _on_error=lambda actor, error: heard.append(error))
    task = SimpleNamespace(_tracked_actor=actor, _on_error=lambda actor, error: heard.append(error))
    manager = SimpleNamespace(_failed_actor_ids=set(), _cleanup_actor=lambda tracked_actor: None)
    with cluster._killed_is_lost():
        RayActorManager._actor_task_failed(manager, task, OutOfMemoryError("low on memory"))
        with pytest.raises(RuntimeError, match="unexpected exception: no"):
            RayActorManager._actor_task_failed(manager, task, ValueError("no"))
    assert [(type(error), str(error)) for error in heard] == 2 * [(RayActorError, "low on memory")]
    with pytest.raises(RuntimeError, match="unexpected exception: low"):  # where Ray knows it itself, ours can go
        RayActorManager._actor_task_failed(manager, task, OutOfMemoryError("low on memory"))


@pytest.mark.parametrize("path", [Path("/dev/full"), Path("/no/such/folder/ray.log")])
def test_a_log_that_cannot_be_written_neither_hides_an_error_nor_says_its_own(
    path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        logging.getLogger("ray").warning("a worker was lost")
        raise UsageError("full; go on with: raysparse resume")

    with pytest.raises(UsageError, match="go on with"), cluster._said_to(path):
        fail()
    assert capfd.readouterr().err == ""
