"""How large a cluster can get: what Ray's autoscaler may still start counts as room for trials.

A cluster that scales to zero has no room at all when a sweep begins. Trials must be handed out all the same: what is
handed out and finds no place is the demand that makes the autoscaler start nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

BOOTSTRAP = Path("~/ray_bootstrap_config.yaml")  # `ray up` puts the cluster's file there on the head node


def nodes_at_most(path: Path = BOOTSTRAP) -> list[dict[str, float]] | None:
    """Resources of every node that the cluster has when it is at its largest; None where no autoscaler can add any.

    Ray is connected. The limits come from the cluster itself where it reports them (KubeRay), else from the file that
    `ray up` leaves on the head node, where a submitted sweep runs.
    """
    from ray._private.state import state

    reported = state.get_cluster_config()
    if reported is not None and reported.node_group_configs:
        groups = [(dict(group.resources), group.max_count) for group in reported.node_group_configs]
        return [resources for resources, count in groups for _ in range(count)]
    path = path.expanduser()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return nodes_of(content) if isinstance(content, Mapping) else None


def nodes_of(cluster: Mapping[str, Any]) -> list[dict[str, float]] | None:
    """The same from the content of a cluster file: the head, then of each type as many as it and the whole allow.

    The richest in GPUs, then CPUs, come first: they are what the limit over all types is spent on.
    """
    types, head = cluster.get("available_node_types"), cluster.get("head_node_type")
    if not isinstance(types, Mapping) or head not in types:
        return None
    limit = int(cluster.get("max_workers", 2))  # Ray's own default
    workers = [
        dict(kind.get("resources", {}))
        for name, kind in types.items()
        if name != head
        for _ in range(int(kind.get("max_workers", limit)))
    ]
    workers.sort(key=lambda resources: (resources.get("GPU", 0), resources.get("CPU", 0)), reverse=True)
    return [dict(types[head].get("resources", {})), *workers[:limit]]
