"""What Prometheus gets to see of a sweep: by name and value, through Ray's own endpoint and a real Prometheus."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from raysparse import space
from raysparse.asha import Asha
from raysparse.space import Sweep
from raysparse.sweep import dashboards
from raysparse.sweep.board import Board, Ledger
from raysparse.sweep.gauges import STATES, Gauges, of_sweep, rung_of
from raysparse.sweep.journal import Event, event

PLANNED = {"stage": "search", "method": "rigl", "config": {"sparse": {}}, "total_steps": 16}


def events() -> list[Event]:
    return [
        *(Event("planned", 0.0, trial_id=name, **PLANNED) for name in "abcde"),
        Event("started", 0.0, trial_id="a"),
        Event("started", 0.0, trial_id="b"),
        Event("started", 1800.0, trial_id="c"),
        Event("stopped", 3600.0, trial_id="b", step=4, fid=9.0, reason="FID"),
        Event("stopped", 3600.0, trial_id="c", step=5, fid=9.5, reason="by me", by="me@here"),
        Event("completed", 7200.0, trial_id="a", step=16, fid=3.0),
        Event("started", 7200.0, trial_id="d"),
    ]


def test_a_sweeps_numbers_by_hand() -> None:
    board = Board()
    for item in events():
        board.apply(item)
    found = {
        (name, *tags.values()): value
        for name, tags, value in of_sweep(board, Asha(grace_steps=2, reduction_factor=2), gpus=4, now=10800.0)
    }
    assert found[("raysparse_active_trials",)] == 1
    assert found[("raysparse_trial_hours",)] == 2 + 1 + 0.5 + 1
    assert found[("raysparse_gpu_hours",)] == 4 * 4.5
    assert found[("raysparse_best_fid", "rigl")] == 3.0
    assert {key[1]: value for key, value in found.items() if key[0] == "raysparse_trials"} == {
        "pending": 1,
        "running": 1,
        "completed": 1,
        "stopped": 2,
        "failed": 0,
    }
    assert [key for key in found if key[0] == "raysparse_stopped_at_rung"] == [("raysparse_stopped_at_rung", "4")]
    assert {name for name, *_ in found} == set(dashboards.OF_SWEEP)


@pytest.mark.parametrize(("step", "rung"), [(2, 2), (3, 2), (4, 4), (9, 8)])
def test_the_rung_that_a_trial_was_stopped_at(step: int, rung: int) -> None:
    board = Board()
    board.apply(Event("planned", 0.0, trial_id="a", **PLANNED))
    board.apply(Event("stopped", 1.0, trial_id="a", step=step, fid=1.0))
    assert rung_of(board.rows["a"], Asha(grace_steps=2, reduction_factor=2)) == rung


def test_the_dashboard_asks_for_every_gauge_and_for_no_other() -> None:
    asked = {name for panel in dashboards.dashboard()["panels"] for name in _names(panel["targets"][0]["expr"])}
    assert asked == {f"ray_{name}" for name in {**dashboards.OF_TRIAL, **dashboards.OF_SWEEP}}
    places = [tuple(panel["gridPos"].values()) for panel in dashboards.dashboard()["panels"]]
    for number, (x, y, w, h) in enumerate(places):
        assert x + w <= 24
        for other_x, other_y, other_w, other_h in places[:number]:
            apart = x >= other_x + other_w or other_x >= x + w or y >= other_y + other_h or other_y >= y + h
            assert apart, "two panels overlap"


def test_the_files_name_each_sweeps_list_and_each_other(tmp_path: Path) -> None:
    paths = dashboards.write(
        tmp_path, [tmp_path / "a", tmp_path / "b"], ray_files=[Path("/tmp/ray/x.json")], prometheus_url="http://p:1"
    )
    assert all(path.is_relative_to(tmp_path / "metrics") for path in paths)
    prometheus, source, provider, board = paths
    scrape = yaml.safe_load(prometheus.read_text())["scrape_configs"][0]
    assert scrape["file_sd_configs"][0]["files"] == [
        str(tmp_path / "a/metrics/targets.json"),
        str(tmp_path / "b/metrics/targets.json"),
        "/tmp/ray/x.json",
    ]
    data_source = yaml.safe_load(source.read_text())["datasources"][0]
    assert data_source["url"] == "http://p:1"
    assert yaml.safe_load(provider.read_text())["providers"][0]["options"]["path"] == str(board.parent)
    for panel in json.loads(board.read_text())["panels"]:
        assert panel["datasource"]["uid"] == data_source["uid"]


@pytest.fixture(scope="module")
def tiny() -> Sweep:
    base = {"train": {"steps": 16}, "evaluate": {"every_steps": 2}}
    asha = {"grace_steps": 2, "reduction_factor": 2}
    return space.parse({"name": "tiny", "base": base, "grid": {"dense": {}}, "asha": asha}, "test")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, ray_home: Path, tiny: Sweep) -> Iterator[Path]:
    """A results folder whose sweep is published by a Ray of its own, without a dashboard."""
    import ray

    results = tmp_path_factory.mktemp("published")
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, _temp_dir=str(ray_home), log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    ledger = Ledger(results)
    for item in events():
        ledger.add(item)
    ledger.add(event("report", trial_id="d", step=4, fid=7.25))
    gauges = Gauges(ledger, tiny, results)
    trial = SimpleNamespace(config={"trial_id": "d"})
    gauges.on_trial_result(0, [], trial, {"fid": 7.25, "train_loss": 0.5, "density": 0.25, "step": 4})
    gauges.on_step_end(0, [])
    yield results
    gauges.on_experiment_end([])
    ledger.close()
    ray.shutdown()
    assert json.loads((results / "metrics" / "targets.json").read_text()) == [], "nothing to scrape any more"


@pytest.mark.ray
def test_rays_endpoint_has_the_gauges_without_a_dashboard(published: Path) -> None:
    [group] = json.loads((published / "metrics" / "targets.json").read_text())
    text = _wait(lambda: _text(group["targets"], "ray_raysparse_gpu_hours"))
    lines = [line for line in text.splitlines() if line.startswith("ray_raysparse")]
    found = {_names(line)[0]: line for line in lines}
    missing = {f"ray_{name}" for name in {**dashboards.OF_TRIAL, **dashboards.OF_SWEEP}} - set(found)
    assert not missing, "each gauge is there"
    trial = found["ray_raysparse_trial_fid"]
    for tag in ('sweep="tiny"', 'trial="d"', 'method="rigl"', 'stage="search"'):
        assert tag in trial
    assert trial.endswith(" 7.25")
    assert found["ray_raysparse_trial_sparsity"].endswith(" 0.75")
    assert sum(line.startswith("ray_raysparse_trials{") for line in lines) == len(STATES)


@pytest.mark.ray
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus here: apt-get install prometheus")
def test_a_real_prometheus_scrapes_it_and_answers_every_panel(published: Path, tmp_path: Path) -> None:
    config = dashboards.write(published, [published], ray_files=[], prometheus_url="http://127.0.0.1:9090")[0]
    config.write_text(config.read_text().replace("10s", "1s"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [
            "prometheus", f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}",
            f"--storage.tsdb.path={tmp_path}",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for panel in dashboards.dashboard()["panels"]:
            query = panel["targets"][0]["expr"].replace("$sweep", "tiny|other")
            result = _wait(lambda query=query: _query(port, query))
            values = {tuple(one["metric"].get(tag) for tag in ("state", "trial")): one["value"][1] for one in result}
            if panel["title"] == "FID by trial":
                assert values == {(None, "d"): "7.25"}
            if panel["title"] == "trials by state":
                assert {state: int(value) for (state, _), value in values.items()}["stopped"] == 2
    finally:
        server.terminate()
        server.wait(timeout=30)


def _names(text: str) -> list[str]:
    return re.findall(r"ray_raysparse_\w+", text)


def _text(targets: list[str], wanted: str) -> str | None:
    """The exposition text, once it has a gauge."""
    for target in targets:
        with urllib.request.urlopen(f"http://{target}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        if f"\n{wanted}" in text:
            return str(text)
    return None


def _query(port: int, query: str) -> list[dict[str, Any]] | None:
    try:
        url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)["data"]["result"] or None
    except OSError:  # it is starting
        return None


def _wait(ask: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = ask()
        if found is not None:
            return found
        time.sleep(0.2)
    raise AssertionError("nothing within a minute")
