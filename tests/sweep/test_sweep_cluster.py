"""What fits on which nodes."""

from __future__ import annotations

import pytest

from raysparse.errors import UsageError
from raysparse.space import Resources
from raysparse.sweep import cluster
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
        ([{"CPU": 2, "GPU": 8}, {"CPU": 0}], Resources(gpus_per_worker=1), 2),
    ],
)
def test_as_many_trials_as_fit(nodes: list[dict[str, float]], resources: Resources, trials: int) -> None:
    assert _check_fits(nodes, resources, "here") == trials


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
