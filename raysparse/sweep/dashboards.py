"""The gauges by name, and the files that Prometheus and Grafana need to show them. Imports no ray.

DIR/metrics/prometheus.yml                        scrapes every node of the sweeps' Rays, found through files
DIR/metrics/grafana/provisioning/...              the data source, and where the dashboards lie
DIR/metrics/grafana/dashboards/raysparse.json     the dashboard
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from raysparse.errors import UsageError
from raysparse.files import write_text

# Ray puts `ray_` before each name.
OF_TRIAL = {
    "raysparse_trial_fid": "FID of a trial at its last report, under its own protocol",
    "raysparse_trial_intermediate_fid": "FID by which trials are compared while they train",
    "raysparse_trial_loss": "training loss of a trial, mean since the report before",
    "raysparse_trial_step": "optimizer steps that a trial has done",
    "raysparse_trial_sparsity": "share of the maskable weights that is zero, as achieved",
}
OF_SWEEP: dict[str, tuple[str, tuple[str, ...]]] = {  # meaning, tags besides the sweep
    "raysparse_active_trials": ("trials that hold resources now", ()),
    "raysparse_trials": ("trials by state", ("state",)),
    "raysparse_stopped_at_rung": ("trials that ASHA stopped, by the rung's step", ("rung",)),
    "raysparse_best_fid": ("lowest FID of a completed trial, by method", ("method",)),
    "raysparse_trial_hours": ("hours that trials held their resources", ()),
    "raysparse_gpu_hours": ("hours x GPUs that trials held", ()),
}
TRIAL_TAGS = ("sweep", "trial", "method", "stage")

SOURCE = "raysparse-prometheus"  # Grafana's name for the data source
SCRAPE_S = 10  # as often as Ray's agent renews its numbers

_ONE = '{sweep=~"$sweep"}'
_PANELS = (  # title, query, legend, kind, width in 24ths, height
    ("active trials", f"sum(ray_raysparse_active_trials{_ONE})", "", "stat", 4, 4),
    ("GPU hours", f"sum(ray_raysparse_gpu_hours{_ONE})", "", "stat", 4, 4),
    ("trial hours", f"sum(ray_raysparse_trial_hours{_ONE})", "", "stat", 4, 4),
    ("trials by state", f"sum by (state) (ray_raysparse_trials{_ONE})", "{{state}}", "bargauge", 12, 8),
    ("best completed FID by method", f"min by (method) (ray_raysparse_best_fid{_ONE})", "{{method}}", "stat", 12, 4),
    ("FID by trial", f"ray_raysparse_trial_fid{_ONE}", "{{trial}}", "timeseries", 12, 9),
    ("intermediate FID by trial", f"ray_raysparse_trial_intermediate_fid{_ONE}", "{{trial}}", "timeseries", 12, 9),
    ("training loss by trial", f"ray_raysparse_trial_loss{_ONE}", "{{trial}}", "timeseries", 12, 9),
    ("steps by trial", f"ray_raysparse_trial_step{_ONE}", "{{trial}}", "timeseries", 12, 8),
    ("sparsity by trial", f"ray_raysparse_trial_sparsity{_ONE}", "{{trial}}", "timeseries", 12, 8),
    (
        "stopped by ASHA, by rung",
        f"sum by (rung) (ray_raysparse_stopped_at_rung{_ONE})",
        "step {{rung}}",
        "bargauge",
        12,
        8,
    ),
    ("trials over time", f"sum by (state) (ray_raysparse_trials{_ONE})", "{{state}}", "timeseries", 12, 8),
)


def write(folder: Path, sweeps: Sequence[Path], *, ray_files: Sequence[Path], prometheus_url: str) -> list[Path]:
    """Write all files under FOLDER/metrics. -> their paths.

    sweeps: results folders, whose drivers keep a list of their nodes. ray_files: lists that Ray itself keeps, of
    clusters with a dashboard. UsageError where the folder cannot be written.
    """
    home = folder.absolute() / "metrics"
    lists = [str(sweep.absolute() / "metrics" / "targets.json") for sweep in sweeps]
    lists += [str(path) for path in ray_files]
    grafana = home / "grafana"
    contents = {
        home / "prometheus.yml": _yaml(prometheus_config(lists)),
        grafana / "provisioning" / "datasources" / "raysparse.yml": _yaml(_data_source(prometheus_url)),
        grafana / "provisioning" / "dashboards" / "raysparse.yml": _yaml(_provider(grafana / "dashboards")),
        grafana / "dashboards" / "raysparse.json": json.dumps(dashboard(), indent=2) + "\n",
    }
    try:
        for path, text in contents.items():
            write_text(path, text)
    except OSError as error:
        raise UsageError(f"cannot write below {home}: {error.strerror}") from error
    return list(contents)


def ray_file() -> Path:
    """Where Ray with a dashboard lists its nodes, on the head's machine."""
    return Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "prom_metrics_service_discovery.json"


def prometheus_config(lists: Sequence[str]) -> dict[str, Any]:
    """prometheus.yml that looks into files of targets, also into ones that appear later."""
    return {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
        "scrape_configs": [
            {
                "job_name": "ray",
                "file_sd_configs": [{"files": list(lists), "refresh_interval": "10s"}],
            }
        ],
    }


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it: a variable `sweep`, and panels that need nothing but Prometheus."""
    panels, x, y, row_height = [], 0, 0, 0
    for number, (title, query, legend, kind, width, height) in enumerate(_PANELS, start=1):
        if x + width > 24:
            x, y, row_height = 0, y + row_height, 0
        panels.append(
            {
                "id": number,
                "title": title,
                "type": kind,
                "datasource": {"type": "prometheus", "uid": SOURCE},
                "gridPos": {"x": x, "y": y, "w": width, "h": height},
                "targets": [{"refId": "A", "expr": query, "legendFormat": legend, "instant": kind != "timeseries"}],
                "fieldConfig": {"defaults": {"decimals": 2} if "hours" in title else {}, "overrides": []},
            }
        )
        x, row_height = x + width, max(row_height, height)
    names = "label_values(ray_raysparse_active_trials, sweep)"
    variable = {
        "name": "sweep",
        "type": "query",
        "datasource": {"type": "prometheus", "uid": SOURCE},
        "query": {"query": names, "refId": "sweep"},
        "definition": names,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
    }
    return {
        "uid": "raysparse",
        "title": "raysparse",
        "schemaVersion": 39,
        "refresh": f"{SCRAPE_S}s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {"list": [variable]},
        "panels": panels,
    }


def _data_source(url: str) -> dict[str, Any]:
    source = {"name": "Prometheus", "uid": SOURCE, "type": "prometheus", "access": "proxy", "url": url}
    return {"apiVersion": 1, "datasources": [source | {"isDefault": True}]}


def _provider(folder: Path) -> dict[str, Any]:
    provider = {"name": "raysparse", "type": "file", "options": {"path": str(folder)}}
    return {"apiVersion": 1, "providers": [provider]}


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, width=10_000)
