"""The doctor's judgement: facts of machines -> checks, each with what to do. Pure."""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

GIB = 2**30
DISK_FAIL, DISK_WARN = 2 * GIB, 20 * GIB  # bytes free
CLOCK_FAIL_S, CLOCK_WARN_S = 60.0, 2.0
REFUSED = (401, 403)


@dataclasses.dataclass(frozen=True)
class Check:
    name: str
    status: str  # ok, warn: a sweep runs, but; fail: it will not, or it is not safe
    found: str
    todo: str | None = None


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known. Nodes by name: _probe.facts, in a cluster with `head` and what Ray counts, `ray`."""

    nodes: Mapping[str, Mapping[str, Any]]
    cluster: bool = False
    silent: list[str] = dataclasses.field(default_factory=list)  # alive to Ray, but they did not answer
    clock_offsets_s: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    storage: str | None = None
    write_errors: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    unseen: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)  # reader -> whose files it misses


def checks(facts: Facts) -> list[Check]:
    """All of them, in the order in which one would mend things."""
    parts = (_nodes, _versions, _gpus, _compilers, _protected, _token_files, _bound, _storage, _disks, _clocks)
    return [check for part in parts for check in part(facts)]


def _nodes(facts: Facts) -> Iterator[Check]:
    if not facts.cluster:
        return
    for name in facts.silent:
        yield Check(
            "nodes",
            "fail",
            f"{name} is alive but ran nothing within a minute",
            "look at its logs in the dashboard; if it is out of memory or disk, end it: the autoscaler starts another",
        )
    workers = [name for name, node in facts.nodes.items() if not node["head"]]
    if not workers:
        yield Check(
            "nodes",
            "warn",
            "only the head is up: what follows says nothing of workers",
            "start one (a sweep does), then look again",
        )
    heads = [(name, node["ray"]["CPU"]) for name, node in facts.nodes.items() if node["head"]]
    busy = [f"{name} has {cpus:g} CPUs" for name, cpus in heads if cpus]
    if workers and busy:
        yield Check(
            "nodes",
            "warn",
            f"the head {busy[0]} for trials: one that takes its memory takes the whole sweep down",
            "start the head with --num-cpus=0, as cluster.yaml does",
        )
    elif workers and not facts.silent:
        yield Check("nodes", "ok", f"the head, without work, and {_count(len(workers), 'worker')}")


def _versions(facts: Facts) -> Iterator[Check]:
    names = ["python", *next(iter(facts.nodes.values()))["versions"]] if facts.nodes else []
    same, sound = [], True
    for name in names:
        found = {
            node: values["python"] if name == "python" else values["versions"].get(name)
            for node, values in facts.nodes.items()
        }
        missing = [node for node, version in found.items() if version is None]
        if len(set(found.values()) - {None}) > 1:
            sound = False
            yield Check(
                "versions",
                "fail",
                f"{name} differs: {_by_value({node: version or 'none' for node, version in found.items()})}",
                "give every node the same image and the same pinned requirements (docker and setup_commands of "
                "cluster.yaml), then end the odd ones: the autoscaler starts them anew",
            )
        elif missing and name == "raysparse":
            if len(missing) < len(found):
                yield Check(
                    "versions",
                    "warn",
                    f"raysparse is not installed on {', '.join(missing)}",
                    "nothing, if sweeps come by `raysparse submit`, which brings the code; else install it there",
                )
        elif missing:
            sound = False
            yield Check(
                "versions", "fail", f"{name} is missing on {', '.join(missing)}", f"pip install {name} there, pinned"
            )
        else:
            same.append(f"{name} {next(iter(found.values()))}")
    if sound and same:
        yield Check("versions", "ok", f"{', '.join(same)} on {_where(facts)}")


def _gpus(facts: Facts) -> Iterator[Check]:
    sound, seen = True, [gpu for node in facts.nodes.values() for gpu in node["gpus"]]
    for name, node in facts.nodes.items():
        real, counted = len(node["gpus"]), node.get("ray", {}).get("GPU")
        if counted is not None and counted > real:
            sound = False
            yield Check(
                "GPUs",
                "fail",
                f"Ray counts {counted:g} GPUs on {name}, its driver shows {real}: trials there cannot use them",
                "install the NVIDIA driver and container runtime (the AMI of cluster.yaml has them), or correct "
                "`resources` of the node type",
            )
        elif counted is not None and counted < real and not node["head"]:
            sound = False
            yield Check(
                "GPUs",
                "warn",
                f"{name} has {real} GPUs, Ray uses {counted:g}",
                "correct `resources` of the node type, or --num-gpus",
            )
    drivers = {name: node["gpus"][0]["driver"] for name, node in facts.nodes.items() if node["gpus"]}
    if len(set(drivers.values())) > 1:
        sound = False
        yield Check(
            "GPUs",
            "warn",
            f"drivers differ: {_by_value(drivers)}",
            "pin one machine image (ImageId) for all node types, so that every trial computes the same",
        )
    if sound and seen:
        kinds = {gpu["name"] for gpu in seen}
        versions = f"driver {', '.join(sorted(set(drivers.values())))}"
        yield Check("GPUs", "ok", f"{len(seen)} on {_where(facts)}: {', '.join(sorted(kinds))}; {versions}")
    elif sound:
        yield Check("GPUs", "ok", f"none on {_where(facts)}: trials run on CPUs")


def _compilers(facts: Facts) -> Iterator[Check]:
    at_work = {name: node["compiler"] for name, node in facts.nodes.items() if not node.get("head")}
    if missing := [name for name, compiler in at_work.items() if compiler is None]:
        yield Check(
            "compiler",
            "warn",
            f"no C++ compiler on {', '.join(missing)}: on its CPU `runtime: auto` runs on PyTorch, without what "
            "sparsity saves; `runtime: sparse` and torch.compile fail",
            "apt-get install g++ there (setup_commands of cluster.yaml), or set CXX to one",
        )
    elif at_work:
        where = _count(len(at_work), "worker") if facts.cluster else "this machine"
        yield Check("compiler", "ok", f"{', '.join(sorted(set(map(str, at_work.values()))))} on {where}")


def _protected(facts: Facts) -> Iterator[Check]:
    modes = {name: (node["token"]["mode"] or "unset").lower() for name, node in facts.nodes.items()}
    if not facts.cluster:
        if "disabled" in modes.values():
            yield Check(
                "token",
                "warn",
                "RAY_AUTH_MODE=disabled: whoever reaches a Ray of this machine can run programs as you",
                "unset RAY_AUTH_MODE: a local Ray then makes a token of its own",
            )
        else:
            yield Check("token", "ok", "a Ray that a sweep starts here asks for a token")
        return
    status = next((node["without_token"] for node in facts.nodes.values() if node["without_token"]), None)
    todo = "RAY_AUTH_MODE=token in both start commands, the token mounted with 0600 (cluster.yaml), and start it again"
    off = sorted(name for name, mode in modes.items() if mode != "token")
    if status is not None and status not in REFUSED:
        yield Check(
            "token", "fail", f"the Jobs API answers {status} without a token: whoever reaches it runs programs", todo
        )
    elif off:
        yield Check("token", "fail", f"RAY_AUTH_MODE is not token on {', '.join(off)}", todo)
    elif status is None:
        yield Check(
            "token",
            "warn",
            "RAY_AUTH_MODE=token on every node, but the dashboard does not answer to be tried",
            "start the head with its dashboard (ray[default]): stopping a trial of several workers needs it as well",
        )
    else:
        yield Check("token", "ok", f"without a token the Jobs API answers {status}; every node has RAY_AUTH_MODE=token")


def _token_files(facts: Facts) -> Iterator[Check]:
    sound = True
    for name, node in facts.nodes.items():
        token = node["token"]
        if token["rights"] is not None and token["rights"] & 0o077:
            sound = False
            yield Check(
                "token file",
                "fail" if facts.cluster else "warn",  # Ray itself writes 0644; here it opens nothing but local sweeps
                f"{token['path']} on {name} has rights {token['rights']:04o}: others there can read it",
                f"chmod 600 {token['path']}; make a new token if others use that machine",
            )
        if token["in_environment"]:
            sound = False
            yield Check(
                "token file",
                "warn",
                f"RAY_AUTH_TOKEN holds the token on {name}: every process, each trial among them, inherits it",
                "keep it in a file (0600), with RAY_AUTH_TOKEN_PATH where that is not ~/.ray/auth_token",
            )
    files = [node["token"]["path"] for node in facts.nodes.values() if node["token"]["rights"] is not None]
    if sound and files:
        yield Check("token file", "ok", f"{files[0]} is its owner's alone on {_where(facts)}")
    elif sound and not facts.cluster:
        yield Check(
            "token file", "ok", "none yet: a local Ray makes one, for a cluster `ray get-auth-token --generate`"
        )


def _bound(facts: Facts) -> Iterator[Check]:
    for name, node in facts.nodes.items():
        if not node.get("head"):
            continue
        listening = node["listening"]
        if listening is None or not listening.get("dashboard"):
            yield Check(
                "bind address",
                "warn",
                f"cannot tell what the dashboard of {name} listens on",
                "look yourself: ss -ltn on the head",
            )
            continue
        guarded = node["without_token"] in REFUSED
        open_to = [address for address in listening["dashboard"] if not ipaddress.ip_address(address).is_loopback]
        if open_to:
            yield Check(
                "bind address",
                "warn" if guarded else "fail",
                f"dashboard and Jobs API listen on {', '.join(open_to)}, "
                + ("with a token in the clear" if guarded else "for anybody in that network"),
                "start the head with --dashboard-host=127.0.0.1 and use the tunnel of `ray dashboard cluster.yaml`",
            )
        else:
            yield Check(
                "bind address", "ok", "dashboard and Jobs API listen on this machine alone, reached by a tunnel"
            )
        control = [address for address in listening.get("GCS", []) if not ipaddress.ip_address(address).is_loopback]
        if control and not guarded:
            yield Check(
                "bind address",
                "fail",
                f"Ray's control plane listens on {', '.join(control)}, and no token protects it",
                "RAY_AUTH_MODE=token in both start commands, and let only the cluster's machines reach its ports",
            )


def _storage(facts: Facts) -> Iterator[Check]:
    if facts.storage is None:
        if facts.cluster:
            yield Check(
                "storage", "warn", "not tried", "--storage DIR: the folder of the results, on storage of all nodes"
            )
        return
    mount = "mount the shared storage there (initialization_commands of cluster.yaml), writable for Ray's user"
    for name, error in facts.write_errors.items():
        if error:
            yield Check("storage", "fail", f"{name} cannot write to {facts.storage}: {error}", mount)
    for name, writers in facts.unseen.items():
        if writers:
            yield Check(
                "storage",
                "fail",
                f"{name} does not see in {facts.storage} what {', '.join(writers)} wrote: it is not the same folder",
                mount,
            )
    if not any(facts.write_errors.values()) and not any(facts.unseen.values()):
        shared = "; each sees what the others write" if len(facts.nodes) > 1 else ""
        yield Check("storage", "ok", f"{facts.storage} is writable on {_where(facts)}{shared}")


def _disks(facts: Facts) -> Iterator[Check]:
    sound, least = True, None
    for name, node in facts.nodes.items():
        for purpose, disk in node["disks"].items():
            free = disk["free_bytes"]
            if free is None:
                sound = False
                yield Check("disk", "warn", f"cannot tell what is free at {disk['path']} on {name}", "df there")
                continue
            least = free if least is None else min(least, free)
            if free < DISK_WARN:
                sound = False
                yield Check(
                    "disk",
                    "fail" if free < DISK_FAIL else "warn",
                    f"{free / GIB:.1f} GiB free for {purpose} files at {disk['path']} on {name}",
                    "make room, or give node types a larger disk (VolumeSize in cluster.yaml); a sweep stops at a full "
                    "one" if purpose == "results" else "make room: Ray spills objects and logs there",
                )  # fmt: skip
    if sound and least is not None:
        yield Check("disk", "ok", f"at least {least / GIB:.0f} GiB free on {_where(facts)}")


def _clocks(facts: Facts) -> Iterator[Check]:
    if len(facts.clock_offsets_s) < 2:
        return
    # What a round trip leaves uncertain is not held against a clock.
    low = min(offset + uncertain for offset, uncertain in facts.clock_offsets_s.values())
    high = max(offset - uncertain for offset, uncertain in facts.clock_offsets_s.values())
    skew = max(high - low, 0.0)
    if skew > CLOCK_WARN_S:
        slow = min(facts.clock_offsets_s, key=lambda name: facts.clock_offsets_s[name][0])
        fast = max(facts.clock_offsets_s, key=lambda name: facts.clock_offsets_s[name][0])
        yield Check(
            "clock",
            "fail" if skew > CLOCK_FAIL_S else "warn",
            f"{fast} is at least {skew:.1f} s ahead of {slow}: times in logs and records do not compare",
            "let chrony or systemd-timesyncd set the clocks",
        )
    else:
        yield Check("clock", "ok", f"{_count(len(facts.clock_offsets_s), 'clock')} agree within {CLOCK_WARN_S:g} s")


def _by_value(values: Mapping[str, str]) -> str:
    """`3.11 on a, b; 3.10 on c`."""
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return "; ".join(f"{value} on {', '.join(names)}" for value, names in sorted(groups.items()))


def _where(facts: Facts) -> str:
    return _count(len(facts.nodes), "node") if facts.cluster else "this machine"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def worst(found: Iterable[Check]) -> str:
    """ok, warn or fail."""
    return max((check.status for check in found), key=("ok", "warn", "fail").index, default="ok")
