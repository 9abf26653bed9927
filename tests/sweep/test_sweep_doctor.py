"""The doctor: each finding from doctored facts, and a real cluster of three nodes."""

from __future__ import annotations

import copy
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from raysparse import cli, native
from raysparse.errors import UsageError
from raysparse.sweep import _probe, doctor
from raysparse.sweep.verdicts import Check, Facts, checks, worst

NODE: dict[str, Any] = {
    "host": "a",
    "python": "3.11.7",
    "versions": {"ray": "2.60.0", "torch": "2.14.1", "raysparse": "0.1.0"},
    "gpus": [{"name": "NVIDIA A10G", "driver": "580.65", "memory_mib": "23028"}],
    "compiler": "/usr/bin/c++",
    "token": {"mode": "token", "path": "/home/ray/.ray/auth_token", "rights": 0o600, "in_environment": False},
    "listening": {},
    "without_token": None,
    "disks": {"temporary": {"path": "/tmp", "free_bytes": 100 * 2**30}},
    "head": False,
    "ray": {"CPU": 4, "GPU": 1},
}
HEAD = NODE | {
    "gpus": [],
    "compiler": None,  # nor has it work
    "ray": {"CPU": 0, "GPU": 0},
    "head": True,
    "listening": {"dashboard": ["127.0.0.1"], "GCS": ["10.0.0.1"]},
    "without_token": 401,
}


def cluster(*changes: tuple[str, str, Any], **facts: Any) -> Facts:
    """A sound cluster of a head and two workers, with (node, dotted place, value) changed."""
    nodes = {name: copy.deepcopy(HEAD if name == "head" else NODE) for name in ("head", "w1", "w2")}
    for node, place, value in changes:
        *path, last = place.split(".")
        inner: Any = nodes[node]
        for part in path:
            inner = inner[part]
        inner[last] = value
    sound: dict[str, Any] = {
        "cluster": True,
        "clock_offsets_s": {"head": (0.0, 0.01), "w1": (0.1, 0.05), "w2": (-0.1, 0.05)},
        "storage": "/mnt/raysparse/results",
        "write_errors": dict.fromkeys(nodes),
        "unseen": {name: [] for name in nodes},
    }
    return Facts(nodes, **(sound | facts))


def test_a_sound_cluster_has_nothing_to_mend() -> None:
    found = checks(cluster())
    assert {check.status for check in found} == {"ok"}, found
    assert not [check for check in found if check.todo]
    names = ["nodes", "versions", "GPUs", "compiler", "token", "token file", "bind address", "storage", "disk", "clock"]
    assert [check.name for check in found] == names


@pytest.mark.parametrize(
    ("facts", "name", "status", "says"),
    [
        (cluster(silent=["w3"]), "nodes", "fail", "w3 is alive but"),
        (cluster(("head", "ray.CPU", 4)), "nodes", "warn", "head has 4 CPUs"),
        (cluster(("w2", "python", "3.10.2")), "versions", "fail", "python differs: 3.10.2 on w2; 3.11.7 on head, w1"),
        (
            cluster(("w1", "versions.ray", "2.59.0")),
            "versions",
            "fail",
            "ray differs: 2.59.0 on w1; 2.60.0 on head, w2",
        ),
        (cluster(("w1", "versions.torch", None)), "versions", "fail", "torch is missing on w1"),
        (cluster(("w1", "versions.raysparse", None)), "versions", "warn", "raysparse is not installed on w1"),
        (cluster(("w1", "versions.raysparse", "0.0.9")), "versions", "fail", "raysparse differs"),
        (cluster(("w1", "gpus", [])), "GPUs", "fail", "Ray counts 1 GPUs on w1, its driver shows 0"),
        (cluster(("w1", "gpus", NODE["gpus"] * 2)), "GPUs", "warn", "w1 has 2 GPUs, Ray uses 1"),
        (
            cluster(("w1", "gpus", [NODE["gpus"][0] | {"driver": "550.1"}])),
            "GPUs",
            "warn",
            "drivers differ: 550.1 on w1; 580.65 on w2",
        ),
        (cluster(("w2", "compiler", None)), "compiler", "warn", "no C.. compiler on w2: .* runs on PyTorch"),
        (cluster(("head", "without_token", 200)), "token", "fail", "answers 200 without a token"),
        (cluster(("w2", "token.mode", None)), "token", "fail", "not token on w2"),
        (cluster(("head", "without_token", None)), "token", "warn", "does not answer"),
        (cluster(("w2", "token.rights", 0o644)), "token file", "fail", "on w2 has rights 0644"),
        (cluster(("w2", "token.in_environment", True)), "token file", "warn", "RAY_AUTH_TOKEN holds the token on w2"),
        (cluster(("head", "listening.dashboard", ["0.0.0.0"])), "bind address", "warn", "listen on 0.0.0.0"),
        (cluster(("head", "listening", None)), "bind address", "warn", "cannot tell"),
        (
            cluster(("head", "listening.dashboard", ["::"]), ("head", "without_token", 200)),
            "bind address",
            "fail",
            "for anybody in that network",
        ),
        (cluster(("head", "without_token", 200)), "bind address", "fail", "control plane listens on 10.0.0.1"),
        (cluster(storage=None), "storage", "warn", "not tried"),
        (
            cluster(write_errors={"w1": "no such folder"}),
            "storage",
            "fail",
            "w1 cannot write to /mnt/raysparse/results",
        ),
        (cluster(unseen={"w2": ["head", "w1"]}), "storage", "fail", "w2 does not see in .* what head, w1 wrote"),
        (
            cluster(("w1", "disks.temporary.free_bytes", 10 * 2**30)),
            "disk",
            "warn",
            "10.0 GiB free for temporary files at /tmp on w1",
        ),
        (cluster(("w1", "disks.temporary.free_bytes", 2**30)), "disk", "fail", "1.0 GiB free"),
        (cluster(("w1", "disks.temporary.free_bytes", None)), "disk", "warn", "cannot tell"),
        (cluster(clock_offsets_s={"head": (0, 0.01), "w1": (5.0, 0.5)}), "clock", "warn", "w1 is at least 4.5 s ahead"),
        (cluster(clock_offsets_s={"head": (0, 0.01), "w1": (-90.0, 0.5)}), "clock", "fail", "head is at least 89.5 s"),
    ],
)
def test_what_is_wrong_is_found_and_says_what_to_do(facts: Facts, name: str, status: str, says: str) -> None:
    found = checks(facts)
    (check,) = [check for check in found if check.name == name and re.search(says, check.found)]
    assert check.status == status
    assert check.todo
    if (name, status) != ("versions", "warn") and name != "bind address":  # these say what is well beside it
        assert not [other for other in found if other.name == name and other.status == "ok"]
    assert worst(found) in (status, "fail")


def test_an_uncertain_clock_is_not_blamed() -> None:
    facts = cluster(clock_offsets_s={"head": (0, 0.0), "w1": (30.0, 40.0)})
    assert [check.status for check in checks(facts) if check.name == "clock"] == ["ok"]


def test_a_head_alone_says_that_nothing_is_known_of_workers() -> None:
    facts = Facts({"head": HEAD}, cluster=True, storage=None)
    found = checks(facts)
    assert [check.found for check in found if check.name == "nodes"] == [
        "only the head is up: what follows says nothing of workers"
    ]
    assert worst(found) == "warn"


def test_listening_sockets_are_read_as_the_kernel_writes_them() -> None:
    lines = [
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid",
        "   0: 0100007F:2049 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0",
        "   1: 00000000:18EB 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0",
        "   2: 0200000A:D2F0 0100007F:2049 01 00000000:00000000 00:00000000 00000000     0",
        "   3: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A 0 0",
        "   4: 0000000000000000FFFF00000100007F:1F91 00000000000000000000000000000000:0000 0A 0 0",
    ]
    assert _probe.listeners("\n".join(lines)) == [
        ("127.0.0.1", 8265),
        ("0.0.0.0", 6379),
        ("::", 8080),
        ("127.0.0.1", 8081),
    ]


def test_a_socket_of_this_machine_is_found() -> None:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        found = _probe.facts(None, {"mine": one.getsockname()[1]}, None)
    assert found["listening"] == {"mine": ["127.0.0.1"]}


@pytest.mark.parametrize(
    ("asked", "names", "found"),
    [
        (None, ["g++"], "g++"),
        (None, [], None),
        ("my++ -O1", ["my++", "c++"], "my++"),
        ("my++", ["c++"], None),
        ("'", [], None),
    ],
)
def test_the_compiler_is_the_one_that_kernels_are_made_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None, names: list[str], found: str | None
) -> None:
    for name in names:
        (tmp_path / name).touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if asked:
        monkeypatch.setenv("CXX", asked)
    assert _probe.facts(None, {}, None)["compiler"] == (str(tmp_path / found) if found else None)
    if found is None:
        with pytest.raises(UsageError, match=r"compiler is missing|is no command"):
            native._compiler()
    else:
        assert native._compiler()[0] == found


def test_storage_is_written_whole_and_missed_where_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_probe, "VISIBLE_WITHIN_S", 0.0)
    assert _probe.write(str(tmp_path), "probe/0", "text") is None
    assert _probe.unseen(str(tmp_path), {"probe/0": "text"}) == []
    assert _probe.unseen(str(tmp_path), {"probe/0": "other", "probe/1": "text"}) == ["probe/0", "probe/1"]
    _probe.remove(str(tmp_path), "probe")
    assert list(tmp_path.iterdir()) == []
    assert _probe.write(str(tmp_path / "not mounted"), "probe/0", "text") == "no such folder"
    assert not (tmp_path / "not mounted").exists()


def test_this_machine_needs_no_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o640)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = CliRunner().invoke(cli.app, ["doctor", "--storage", str(tmp_path), "--json"])
    content = json.loads(done.stdout)
    found = {row["name"]: row for row in content["checks"]}
    assert found["storage"]["status"] == "ok"
    assert found["token file"]["status"] == "warn"
    assert f"chmod 600 {token}" in found["token file"]["todo"]
    assert "secret" not in done.stdout
    token.chmod(0o600)
    assert {check.name: check.status for check in doctor.diagnose(None, str(tmp_path))}["token file"] == "ok"

    done = CliRunner().invoke(cli.app, ["doctor", "--storage", str(tmp_path / "none")])
    assert done.exit_code == 1
    assert "fail  storage: this machine cannot write" in done.stdout
    assert "do: mount" in done.stdout
    with pytest.raises(UsageError, match="absolute"):
        doctor.diagnose(None, "results")


def test_a_result_is_read_from_among_other_lines() -> None:
    found = [Check("disk", "fail", "1.0 GiB free", "make room")]
    text = f"Running entrypoint\n{doctor.as_json(found)}\njob said more\n"
    assert doctor.read_checks(text, "ray job logs") == found
    with pytest.raises(UsageError, match=r"ray job logs(.|\n)*No module named"):
        doctor.read_checks("Traceback\nNo module named torch\n", "ray job logs")


@pytest.fixture(scope="module")
def three_nodes(ray_home: Path) -> Iterator[Any]:
    """A head without work and two workers under token authentication, all on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    before = os.environ.get("RAY_AUTH_MODE")
    from raysparse.sweep import auth

    auth.use_token()
    running = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": 0},
    )
    try:
        for _ in range(2):
            running.add_node(num_cpus=1)
        running.wait_for_nodes()
        yield running
    finally:
        ray.shutdown()
        running.shutdown()
        os.environ.pop("RAY_AUTH_MODE")
        if before is not None:
            os.environ["RAY_AUTH_MODE"] = before


@pytest.mark.ray
@pytest.mark.slow
def test_every_node_of_a_cluster_is_asked(three_nodes: Any, tmp_path: Path) -> None:
    found = {check.name: check for check in doctor.diagnose(three_nodes.address, str(tmp_path))}
    assert found["nodes"].found == "the head, without work, and 2 workers"
    assert found["versions"].status == "ok"
    assert found["versions"].found.endswith("on 3 nodes")
    assert found["token"].found == "without a token the Jobs API answers 401; every node has RAY_AUTH_MODE=token"
    assert found["token file"].status == "ok"
    assert found["bind address"].found.startswith("dashboard and Jobs API listen on this machine alone")
    assert found["storage"].found == f"{tmp_path} is writable on 3 nodes; each sees what the others write"
    assert found["clock"].status == "ok"
    assert list(tmp_path.iterdir()) == []  # its own files are gone

    missing = doctor.diagnose(three_nodes.address, str(tmp_path / "not mounted"))
    assert [check.status for check in missing if check.name == "storage"] == ["fail"] * 3
    assert not (tmp_path / "not mounted").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_frozen_node_is_named_instead_of_waited_for(
    three_nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(doctor, "ANSWER_WITHIN_S", 8.0)
    odd = three_nodes.add_node(num_cpus=1)
    odd_id = odd.node_id[-6:]

    def one_sleeps(storage: str | None, ports: dict[str, int], dashboard: str | None) -> dict[str, Any]:
        if ray.get_runtime_context().get_node_id().endswith(odd_id):
            time.sleep(60)
        return real(storage, ports, dashboard)

    real = _probe.facts
    monkeypatch.setattr(_probe, "facts", one_sleeps)
    started = time.monotonic()
    found = doctor.diagnose(three_nodes.address, str(tmp_path))
    assert time.monotonic() - started < 45
    # On busy cores another one may be silent too.
    frozen = [check.status for check in found if check.name == "nodes" and odd_id in check.found]
    assert frozen == ["fail"]
    three_nodes.remove_node(odd)
