"""kuberay.yaml against KubeRay's own schema, and against what its operator refuses beyond that.

kuberay_rayjob_v1.json.gz is the schema of RayJob v1 as KubeRay 1.7.0 ships it (Apache-2.0, Copyright the KubeRay
authors), without the descriptions; its `$comment` says from where. Nothing here has run on Kubernetes.
"""

from __future__ import annotations

import copy
import gzip
import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from raysparse.cli import load_sweep

ROOT = Path(__file__).resolve().parents[1]


def strict(node: Any) -> Any:
    """The schema with unknown keys refused, as `kubectl create --validate=strict` does."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {key: strict(value) for key, value in node.items()}
    free = node.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in node
    if node.get("type") == "object" and isinstance(node.get("properties"), dict) and not free:
        found["additionalProperties"] = False
    return found


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft7Validator:
    with gzip.open(ROOT / "tests/kuberay_rayjob_v1.json.gz") as stream:
        found = strict(json.load(stream))
    # In the CRD `metadata` is only an object: the API server knows the rest.
    found["properties"]["metadata"] = {"properties": {"name": {"type": "string"}}, "additionalProperties": False}
    return jsonschema.Draft7Validator(found)


@pytest.fixture
def job() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "kuberay.yaml").read_text(encoding="utf-8")))


def test_kuberays_own_schema_accepts_it(job: dict[str, Any], validator: jsonschema.Draft7Validator) -> None:
    validator.validate(job)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.shutdownAfterJobFinish", True),
        ("spec.shutdownAfterJobFinishes", "yes"),
        ("spec.rayClusterSpec.authOptions.mode", "tokens"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.container", []),
        ("spec.rayClusterSpec.autoscalerOptions.idleTimeoutSeconds", "10m"),
    ],
)
def test_kuberays_own_schema_refuses_what_is_wrong(
    job: dict[str, Any], validator: jsonschema.Draft7Validator, path: str, value: Any
) -> None:
    wrong = copy.deepcopy(job)
    *sections, name = path.split(".")
    place = wrong
    for section in sections:
        place = place[section]
    place[name] = value
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(wrong)


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_it_ends_its_machines_and_asks_for_a_token(job: dict[str, Any]) -> None:
    spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] >= 0  # more than 0 is refused without shutdownAfterJobFinishes
    # The operator refuses a token before Ray 2.52, and Kubernetes' own tokens for a RayJob.
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52)
    assert len(job["metadata"]["name"]) <= 47  # the operator appends to it


def test_the_head_does_no_work_and_workers_come_and_go(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["enableInTreeAutoscaling"]
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == 0 < group["maxReplicas"]
    assert all(pod["restartPolicy"] == "Never" for pod in pods(job))


def test_all_pods_have_one_image_the_shared_storage_and_what_they_ask_for(job: dict[str, Any]) -> None:
    assert len({container["image"] for pod in pods(job) for container in pod["containers"]}) == 1
    for pod in pods(job):
        (container,) = pod["containers"]
        assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {"name": "RAYSPARSE_DATA", "value": "/mnt/raysparse/data"} in container["env"]


def test_its_versions_are_those_of_the_other_cluster_files(job: dict[str, Any]) -> None:
    text = (ROOT / "kuberay.yaml").read_text(encoding="utf-8")
    image = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))["docker"]["worker_image"]
    assert f"FROM {image}\n" in text
    assert job["spec"]["rayClusterSpec"]["rayVersion"] in image


def test_its_entrypoints_are_commands_of_raysparse(job: dict[str, Any]) -> None:
    other = next(
        line.partition("entrypoint: ")[2]
        for line in (ROOT / "kuberay.yaml").read_text(encoding="utf-8").splitlines()
        if line.strip().startswith("# entrypoint: ")
    )
    program, command, space_file, *options = shlex.split(job["spec"]["entrypoint"])
    assert (program, command) == ("raysparse", "sweep")
    assert options[::2] == ["--output", "--set"]
    sweep = load_sweep(ROOT / space_file.removeprefix("/home/ray/raysparse/"), options[3:4], None)
    assert sweep.resources.gpus_per_worker == 1
    assert shlex.split(other) == ["raysparse", "resume", options[1]]
