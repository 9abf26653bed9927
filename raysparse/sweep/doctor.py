"""`raysparse doctor`: is this machine, or this cluster, fit for a sweep, and if not, what is to be done?

`examine` collects facts (from every node, by _probe.py), verdicts.py judges them; that is pure, so that every failing
case has a test without a failing machine. Nothing is repaired here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from raysparse.errors import UsageError
from raysparse.sweep import _probe, auth
from raysparse.sweep.verdicts import Check, Facts, checks

ANSWER_WITHIN_S = 60.0  # of a node: a worker process starts and imports Ray
CLOCK_ROUNDS = 3


def diagnose(address: str | None, storage: str | None, token: Path | None = None) -> list[Check]:
    """All checks of a cluster, or of this machine.

    address: None: this machine, without starting Ray. `auto` or HOST:PORT of a cluster's GCS: from one of its machines.
    http://...: the dashboard, such as a tunnel's: the same is done by a job there. storage: the folder of the results,
    as the cluster sees it. UsageError where nothing answers.
    """
    if storage is not None and not Path(storage).expanduser().is_absolute():
        raise UsageError(f"--storage {storage!r} must be an absolute path: every machine looks for the same one")
    if address is None:
        return checks(this_machine(storage))
    if urlsplit(address).scheme in ("http", "https"):
        return _by_job(address, storage, token)
    return checks(examine(address, storage, token))


def this_machine(storage: str | None) -> Facts:
    """Facts of this machine alone."""
    name = "this machine"
    facts = _probe.facts(storage, {}, None)
    errors: dict[str, str | None] = {}
    if storage is not None:
        directory = _directory()
        errors[name] = _probe.write(storage, f"{directory}/0", "")
        _probe.remove(storage, directory)
    return Facts({name: facts}, storage=storage, write_errors=errors)


def examine(address: str, storage: str | None, token: Path | None = None) -> Facts:
    """Facts of every living node of a running cluster. Connects to it, and disconnects."""
    if token is not None or auth.token_path().is_file():
        auth.use_token(token)
    from raysparse.sweep.cluster import ENVIRONMENT

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    try:
        context = ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        raise UsageError(
            f"no Ray cluster answers at {address!r}: {error}; from a machine outside it, give the dashboard's address, "
            "such as http://127.0.0.1:8265 after `ray dashboard cluster.yaml`"
        ) from error
    try:
        return _of_cluster(context, storage)
    finally:
        ray.shutdown()


def _of_cluster(context: Any, storage: str | None) -> Facts:
    import ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(_probe)
    try:
        nodes = {_name(node): node for node in ray.nodes() if node["Alive"]}
        head = {name for name, node in nodes.items() if "node:__internal_head__" in node["Resources"]}
        dashboard = context.dashboard_url or None
        ports = {"GCS": _port(ray.get_runtime_context().gcs_address)}
        if dashboard:
            ports["dashboard"] = _port(dashboard)

        def asked_of(name: str) -> tuple[Any, ...]:
            return (
                (storage, ports, f"http://{dashboard}" if dashboard else None) if name in head else (storage, {}, None)
            )

        facts = _on_each(nodes, _probe.facts, asked_of)
        for name, found in facts.items():
            resources = nodes[name]["Resources"]
            found |= {"head": name in head, "ray": {kind: resources.get(kind, 0) for kind in ("CPU", "GPU")}}
        answering = {name: node for name, node in nodes.items() if name in facts}
        offsets = _clock_offsets(answering)
        errors, unseen = _try_storage(answering, storage) if storage else ({}, {})
        return Facts(
            facts,
            cluster=True,
            silent=sorted(set(nodes) - set(facts)),
            clock_offsets_s=offsets,
            storage=storage,
            write_errors=errors,
            unseen=unseen,
        )
    finally:
        cloudpickle.unregister_pickle_by_value(_probe)


def _on_each(
    nodes: Mapping[str, Any], function: Callable[..., Any], arguments: Callable[[str], tuple[Any, ...]]
) -> dict[str, Any]:
    """What `function` returns on each node; without those that do not answer in time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(function)
    asked = {}
    for name, node in nodes.items():
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        reference = task.options(num_cpus=0, max_retries=0, scheduling_strategy=there).remote(*arguments(name))
        asked[reference] = name
    done, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_WITHIN_S)
    answers = {}
    for reference in done:
        try:
            answers[asked[reference]] = ray.get(reference)
        except ray.exceptions.RayError:
            continue  # the node went away: it counts as silent
    for reference in late:
        ray.cancel(reference, force=True)
    return answers


def _clock_offsets(nodes: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """(seconds that a node's clock is ahead of this one, uncertainty): the best of three round trips."""
    best: dict[str, tuple[float, float]] = {}
    for name, node in nodes.items():
        for _ in range(CLOCK_ROUNDS):
            before = time.time()
            answer = _on_each({name: node}, _probe.clock, lambda _: ())
            after = time.time()
            offset, uncertain = answer.get(name, before) - (before + after) / 2, (after - before) / 2
            if name in answer and (name not in best or uncertain < best[name][1]):
                best[name] = (offset, uncertain)
    return best


def _try_storage(nodes: Mapping[str, Any], storage: str) -> tuple[dict[str, str | None], dict[str, list[str]]]:
    """Every node writes a file, then every node looks for all of them."""
    directory = _directory()
    content = {name: secrets.token_hex(8) for name in nodes}
    files = {name: f"{directory}/{number}" for number, name in enumerate(nodes)}
    errors = _on_each(nodes, _probe.write, lambda name: (storage, files[name], content[name]))
    expected = {files[name]: content[name] for name, error in errors.items() if error is None}
    writers = {file: name for name, file in files.items()}
    try:
        missing = _on_each(nodes, _probe.unseen, lambda _: (storage, expected))
    finally:
        _on_each(nodes, _probe.remove, lambda _: (storage, directory))
    return errors, {name: [writers[file] for file in found] for name, found in missing.items()}


def _by_job(address: str, storage: str | None, token: Path | None) -> list[Check]:
    """The cluster behind a dashboard examines itself, in a job."""
    import tempfile

    from raysparse.sweep import submit

    words = ["doctor", "--address", "auto", "--json", *(["--storage", storage] if storage else [])]
    with tempfile.TemporaryDirectory(prefix="raysparse-doctor-") as stage:
        job = submit.submit(Path(stage), words, address, name="doctor", token=token)
    said: list[str] = []
    submit.follow(job, said.append)
    return read_checks("".join(said), job.ray_command("logs", job.job_id))


def read_checks(text: str, logs: str) -> list[Check]:
    """The checks in what a doctor's job printed. UsageError where there are none, with the last lines of it."""
    for line in reversed(text.splitlines()):
        if line.startswith('{"checks":'):
            return [Check(**row) for row in json.loads(line)["checks"]]
    last = "\n".join(text.splitlines()[-5:])
    raise UsageError(f"the cluster's own check ended without a result; its log: {logs}\n{last}")


def as_json(found: Iterable[Check]) -> str:
    rows = [dataclasses.asdict(check) for check in found]
    return json.dumps({"checks": rows, "fit": not any(row["status"] == "fail" for row in rows)})


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerAddress']} ({node['NodeID'][-6:]})"


def _port(address: str) -> int:
    return int(address.rstrip("/").rpartition(":")[2])


def _directory() -> str:
    return f".raysparse-doctor-{secrets.token_hex(4)}"
