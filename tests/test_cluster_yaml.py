"""The cluster files: what Ray's own check says of them, and what must never be lost when they are edited."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
FILES = ("cluster.yaml", "cluster.gcp.yaml", "cluster.local.yaml")
CLOUDS = FILES[:2]


def read(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / name).read_text(encoding="utf-8")))


def checked(cluster: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` checks it, without the cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return dict(prepared)


def start_command(cluster: dict[str, Any], kind: str) -> str:
    (command,) = [line for line in cluster[f"{kind}_start_ray_commands"] if "ray start" in line]
    return str(command)


@pytest.mark.parametrize("name", FILES)
def test_rays_own_check_accepts_it(name: str) -> None:
    checked(read(name))


def test_rays_own_check_refuses_what_is_wrong() -> None:
    cluster = read("cluster.yaml")
    with pytest.raises(Exception, match="idle_timeout"):
        checked(cluster | {"idle_timeout_minuets": 5})
    with pytest.raises(Exception, match="head_node_type"):
        checked(cluster | {"head_node_type": "none of them"})


@pytest.mark.parametrize("name", FILES)
def test_both_start_commands_ask_for_the_token(name: str) -> None:
    cluster = read(name)
    for kind in ("head", "worker"):
        assert "RAY_AUTH_MODE=token" in start_command(cluster, kind).split("ray start")[0]
    ((there, here),) = cluster["file_mounts"].items()
    assert here == "~/.ray/auth_token"
    assert there.endswith("/.ray/auth_token")  # where Ray looks for it
    assert any("chmod 600 ~/.ray/auth_token" in line for line in cluster["setup_commands"])


@pytest.mark.parametrize("name", FILES)
def test_the_dashboard_is_not_for_the_network(name: str) -> None:
    command = start_command(read(name), "head")
    assert "--dashboard-host=127.0.0.1" in command.split()
    assert "0.0.0.0" not in command


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["head", "worker"])
def test_ports_are_fixed_and_different_and_outside_the_workers_range(name: str, kind: str) -> None:
    found = re.findall(r"--([a-z-]*port)=(\d+)", start_command(read(name), kind))
    ports = [int(number) for _, number in found]
    wanted = {"object-manager-port", "node-manager-port", "dashboard-agent-listen-port", "metrics-export-port"}
    assert wanted <= {option for option, _ in found}
    assert len(set(ports)) == len(ports)
    assert not [port for port in ports if 10002 <= port <= 19999]


@pytest.mark.parametrize("name", CLOUDS)
def test_the_head_is_on_demand_without_work_and_workers_are_spot_from_zero(name: str) -> None:
    cluster = checked(read(name))
    kinds = cluster["available_node_types"]
    head = kinds.pop(cluster["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert "spot" not in str(head["node_config"])
    assert "preemptible" not in str(head["node_config"])
    assert kinds
    for kind in kinds.values():
        assert kind["min_workers"] == 0
        assert 0 < kind["max_workers"] <= cluster["max_workers"]
        assert kind["resources"]["GPU"] >= 1
        config = str(kind["node_config"])
        assert "'MarketType': 'spot'" in config or "'preemptible': True" in config


@pytest.mark.parametrize("name", CLOUDS)
def test_nothing_idle_is_paid_for(name: str) -> None:
    cluster = read(name)
    assert cluster["provider"]["cache_stopped_nodes"] is False
    assert 0 < cluster["idle_timeout_minutes"] <= 15
    for kind in cluster["available_node_types"].values():
        disks = kind["node_config"].get("BlockDeviceMappings") or kind["node_config"]["disks"]
        assert all(disk.get("autoDelete") or disk["Ebs"]["DeleteOnTermination"] for disk in disks)


@pytest.mark.parametrize("name", FILES)
def test_versions_are_pinned_and_are_the_projects(name: str) -> None:
    cluster = read(name)
    for image in [value for key, value in cluster.get("docker", {}).items() if key.endswith("image")]:
        assert re.fullmatch(r"rayproject/ray:2\.60\.0-py311-(cpu|gpu)(@sha256:[0-9a-f]{64})?", image)
    (install,) = [line for line in cluster["setup_commands"] if "pip install" in line]
    pins = {pin.name.lower(): pin for pin in map(Requirement, re.findall(r"'([^']+)'", install))}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = {item.name.lower(): item for item in map(Requirement, project["dependencies"])}
    assert set(pins) == set(wanted)
    for package, item in wanted.items():
        ((operator, version),) = [(part.operator, part.version) for part in pins[package].specifier]
        assert operator == "=="
        assert item.specifier.contains(version), f"{package} {version} is not {item.specifier}"
        assert item.extras <= pins[package].extras


@pytest.mark.parametrize("name", CLOUDS)
def test_every_node_mounts_the_shared_storage_where_a_sweep_looks_for_it(name: str) -> None:
    from raysparse.sweep.submit import SHARED

    cluster = read(name)
    mounts = [line for line in cluster["initialization_commands"] if re.search(r"\bmount -t nfs", line)]
    assert len(mounts) == 1
    assert mounts[0].split()[-1] == str(SHARED)
    assert f"-v {SHARED}:{SHARED}" in cluster["docker"]["run_options"]
    for kind in ("head", "worker"):
        assert f"RAYSPARSE_DATA={SHARED}/data" in start_command(cluster, kind)


def test_what_is_to_be_replaced_is_said() -> None:
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    assert re.findall(r"\S*REPLACE_\w+", text.split("cluster_name:")[1]) == ["ami-REPLACE_ME", "fs-REPLACE_ME"]
