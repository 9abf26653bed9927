"""watch, ls, show, diff, stop, retry, metrics: on one real sweep with a failure and a stop, and on folders by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import pty
import re
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysparse import cli, space
from raysparse import results as records
from raysparse.results import Facts, Outcome, Report
from raysparse.sweep.board import Board, Ledger
from raysparse.sweep.journal import event

Run = Callable[..., tuple[int, str, str]]

SWEEP: dict[str, Any] = {
    "name": "tiny",
    "base": {
        "data": {"name": "hershey", "train_examples": 64},
        "model": {"options": {"hidden": 8, "layers": 1}},
        "train": {"steps": 8, "batch_size": 8},
        "evaluate": {
            "extractor": "oriented_energy", "every_steps": 2, "generated": 16, "references": 32, "ddim_steps": 2,
            "batch_size": 16, "validation_examples": 128, "kid_subsets": 2, "kid_subset_size": 8, "grid": 4,
        },
    },
    "grid": {"dense": {}, "static": {"sparsity": [0.5, 0.75, 0.9]}},
}  # fmt: skip


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line; gives (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["raysparse", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@dataclasses.dataclass(frozen=True)
class Seen:
    """A sweep of four trials: one was made to raise, one was stopped by a person while it waited."""

    live: Path  # its folder
    results: Path  # a copy of it, as it was when the sweep had ended
    failed: str
    stopped: str
    said: str  # by `raysparse sweep`, on stderr
    watched: str  # by `raysparse watch`
    stop_said: str


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", "from raysparse import cli; cli.main()", *map(str, words)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, ray_home: Path) -> Seen:
    folder = tmp_path_factory.mktemp("watched")
    live, path = folder / "live", folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(SWEEP))
    sweep = space.load(path)
    _, fails, _, last = [space.trial(sweep, point).trial_id for point in space.grid_points(sweep)]
    environment = os.environ | {"COLUMNS": "100"}
    driver = subprocess.Popen(
        command("sweep", path, "--output", live, "--cpus", 1), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, env=environment,
    )  # fmt: skip
    _wait(lambda: fails in Board.load(live).rows, driver)
    (live / "trials" / fails).mkdir(parents=True)
    (live / "trials" / fails / "samples").touch()  # a file where the trial wants a folder
    watch = subprocess.Popen(command("watch", live), stdout=subprocess.PIPE, text=True, env=environment)
    stop = subprocess.run(command("stop", live, last[:-3]), capture_output=True, text=True, timeout=60, check=True)
    try:
        _, said = driver.communicate(timeout=200)
        watched, _ = watch.communicate(timeout=20)
    finally:
        driver.kill()
        watch.kill()
    assert driver.returncode == watch.returncode == 0, said
    results = folder / "copy"
    shutil.copytree(live, results)
    return Seen(live, results, fails, last, said, watched, stop.stdout)


def _wait(ready: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.ray
def test_a_failing_trial_shows_its_last_lines_in_the_sweep_and_in_watch(seen: Seen) -> None:
    for said in (seen.said, seen.watched):
        lines = said.splitlines()
        [at] = [number for number, line in enumerate(lines) if "FAILED" in line and seen.failed in line]
        below = lines[at + 1 :]
        tail = below[: next(number for number, line in enumerate(below) if not line.startswith("    | "))]
        assert 5 < len(tail) <= 20
        assert any("Traceback" in line for line in tail)
        assert "Error: " in tail[-1]
        assert str(seen.live / "trials" / seen.failed) in tail[-1]


@pytest.mark.ray
def test_a_trial_that_a_person_stopped_ends_at_its_next_report(seen: Seen) -> None:
    row = Board.load(seen.results).rows[seen.stopped]
    assert "asked for: the driver ends it after its first report" in seen.stop_said
    assert (row.state, row.step) == ("STOPPED", 2)
    assert row.stopped_by is not None
    assert row.stopped_by.endswith(f"@{platform.node()}")
    assert row.reason == f"by {row.stopped_by} at step 2"
    table = records.read_trial(seen.results / "records" / f"{seen.stopped}.parquet").to_pylist()
    assert [(one["state"], one["stopped_at_step"], one["state_reason"]) for one in table] == [
        ("STOPPED", None, row.reason)  # 2 is no rung
    ]


@pytest.mark.ray
def test_watch_follows_without_a_terminal_and_ends_with_the_sweep(seen: Seen) -> None:
    events = [line for line in seen.watched.splitlines() if not line.startswith("    | ")]
    assert events[-2].endswith("finished")
    assert events[-1] == f"finished, 1 failed; to try them again: raysparse retry {seen.live} --failed"
    assert sum(": step " in line and "report" in line for line in events) == 3 + 3
    assert sum("  completed  " in line for line in events) == 2


@pytest.mark.ray
def test_ls_show_and_diff_of_a_real_sweep(seen: Seen, run: Run) -> None:
    code, out, _ = run("ls", seen.results.parent, "--json")
    assert code == 0
    listed = {one["results"]: one for one in json.loads(out)}
    assert set(listed) == {str(seen.live), str(seen.results)}
    assert listed[str(seen.live)]["trials"] == {"COMPLETED": 2, "FAILED": 1, "STOPPED": 1}
    assert {one["method"] for one in listed[str(seen.live)]["best"]} == {"dense", "static"}
    assert listed[str(seen.live)]["trial_hours"] > 0

    page = json.loads(run("show", seen.results, seen.failed.rpartition("-")[2][:6], "--json")[1])
    assert (page["trial_id"], page["state"]) == (seen.failed, "FAILED")
    assert any("Traceback" in line for line in page["log"])
    assert f"raysparse retry {seen.results} {seen.failed}" in page["what_to_do"]

    dense = json.loads(run("ls", seen.results, "--json")[1])["table"][0]["trial_id"]
    page = json.loads(run("show", seen.results, dense, "--json")[1])
    assert [report["step"] for report in page["reports"]] == [2, 4, 6, 8]
    assert Path(page["checkpoint"]).is_dir()
    assert Path(page["samples"]).is_file()
    assert "step 8: loss" in page["log"][-1]
    words = page["command"].split()
    assert words[:2] == ["raysparse", "train"]
    assert cli.load_trial(Path(words[2]), None, None).trial_id == dense, "the command trains the same trial"

    found = json.loads(run("diff", seen.results, dense, seen.stopped, "--json")[1])
    assert found["comparable"]
    assert found["settings"]["sparse.sparsity"] == [None, 0.9]
    assert [line["step"] for line in found["fids"]] == [2, 4, 6, 8]
    assert found["fids"][3]["fids"][1] is None
    assert (seen.live / "metrics" / "targets.json").read_text() == "[]\n", "a driver lists its nodes while it runs"


@pytest.mark.ray
def test_failed_trials_are_tried_again_and_the_sweep_ends_whole(seen: Seen, run: Run) -> None:
    (seen.live / "trials" / seen.failed / "samples").unlink()
    code, out, _ = run("retry", seen.live, "--failed", "--json")
    assert (code, json.loads(out)["reopened"]) == (0, [seen.failed])
    assert run("watch", seen.live, "--once")[1].splitlines()[-1].endswith(f"go on with: raysparse resume {seen.live}")
    table = records.read_trial(seen.live / "records" / f"{seen.failed}.parquet")
    assert set(table["state"].to_pylist()) == {"RUNNING"}
    subprocess.run(command("resume", seen.live, "--cpus", 1), check=True, capture_output=True, timeout=200)
    board = Board.load(seen.live)
    assert board.finished
    assert board.rows[seen.failed].state == "COMPLETED"
    assert sorted(board.rows[seen.failed].fids) == [2, 4, 6, 8]
    assert board.rows[seen.stopped].state == "STOPPED"
    table = records.read_trial(seen.live / "records" / f"{seen.failed}.parquet")
    assert table["step"].to_pylist() == [2, 4, 6, 8]
    assert set(table["state"].to_pylist()) == {"COMPLETED"}
    assert "no trial of this sweep has failed" in run("retry", seen.live, "--failed")[1]


PLANNED = {"stage": "search", "seed": 0, "total_steps": 16}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A sweep by hand, whose driver was killed: rigl-aa1 is done, rigl-aa2 was measured otherwise, rigl-ab3 waits."""
    folder = tmp_path / "by hand"
    sweep = space.parse(SWEEP, "test")
    folder.mkdir()
    content = {"digest": sweep.digest, "command": "raysparse sweep x.yaml", "versions": {}, "sweep": SWEEP}
    (folder / "sweep.json").write_text(json.dumps(content))
    (folder / "lock").write_text(f"process 999999999 on {platform.node()}\n")
    ledger = Ledger(folder)
    for name, generated in (("rigl-aa1", 16), ("rigl-aa2", 99), ("rigl-ab3", 16)):
        config = {"sparse": {"sparsity": 0.5}, "evaluate": {"generated": generated}, "data": {"name": "hershey"}}
        ledger.add(event("planned", trial_id=name, method="rigl", point={"method": "rigl"}, config=config, **PLANNED))
        if name != "rigl-ab3":
            ledger.add(event("completed", trial_id=name, step=16, fid=float(generated)))
            record(folder, name, generated, config)
    ledger.close()
    return folder


def record(folder: Path, name: str, generated: int, config: dict[str, Any], state: str = "COMPLETED") -> None:
    text = dict.fromkeys(("sweep", "model", "dataset", "allocation", "versions", "command"), "x")
    known = text | {"trial_id": name, "stage": "search", "method": "rigl", "seed": 0, "total_steps": 16}
    known |= {"protocol": json.dumps({"generated": generated}), "config": json.dumps(config)}
    needed = [field.name for field in dataclasses.fields(Facts) if field.default is dataclasses.MISSING]
    facts = Facts(**{name: known.get(name, 1) for name in needed})
    report = Report(
        16, 1.0, None, float(generated), None, None, 0.5, "{}", 0, 0.0, 1.0, 1.0, None, 1.0, 1.0
    )  # fmt: skip
    records.write_trial(folder, facts, Outcome(state), [report])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["watch", "absent"], "not a sweep's results folder"),
        (["ls", "absent"], "no folder absent"),
        (["show", "RESULTS", "rigl-ab4"], "did you mean 'rigl-ab3'"),
        (["show", "RESULTS", "rigl-aa"], "the beginning of 2 trials: rigl-aa1, rigl-aa2"),
        (["show", "RESULTS", ""], "the beginning of 3 trials"),
        (["diff", "RESULTS", "aa1", "zz"], "unknown trial 'zz'"),
        (["stop", "RESULTS", "zz"], "unknown trial 'zz'"),
        (["stop", "RESULTS", "aa1"], "has ended: completed"),
        (["retry", "RESULTS"], "either --failed or their ids"),
        (["retry", "RESULTS", "aa1"], "it is completed"),
        (["retry", "RESULTS", "aa1", "--failed"], "either --failed or their ids"),
        (["retry", "absent", "--failed"], "not a sweep's results folder"),
        (["metrics", "absent"], "no folder absent"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(run: Run, results: Path, words: list[str], message: str) -> None:
    code, out, err = run(*(results if word == "RESULTS" else word for word in words))
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_sweep_that_ended_before_its_first_trial_is_told_in_words(run: Run, results: Path) -> None:
    (results / "journal.jsonl").unlink()
    (results / "lock").unlink()
    assert run("show", results, "dense") == (2, "", "error: there is no trial 'dense': none has begun yet\n")
    code, out, _ = run("watch", results)
    assert (code, out) == (1, f"no driver runs, 0 trials are open; go on with: raysparse resume '{results}'\n")


def test_nothing_is_said_to_run_where_the_driver_was_killed(run: Run, results: Path) -> None:
    ledger, config = Ledger(results), {"sparse": {"sparsity": 0.5}}
    ledger.add(event("planned", trial_id="set-ab4", method="set", point={"method": "set"}, config=config, **PLANNED))
    ledger.add(event("started", trial_id="set-ab4"))
    ledger.add(event("report", trial_id="set-ab4", step=8, fid=7.0))
    ledger.close()
    for words in (["ls", results], ["ls", results.parent]):
        said = run(*words)[1]
        assert "best of set (search): FID 7.000, set-ab4 at step 8, open" in said
        assert "running" not in said


def test_watching_a_sweep_whose_driver_was_killed_says_so_and_what_to_do(run: Run, results: Path) -> None:
    code, out, _ = run("watch", results)
    assert code == 1
    assert out.splitlines()[-1] == (
        f"no driver runs (process 999999999 on {platform.node()} is gone), 1 trials are open; go on with: "
        f"raysparse resume '{results}'"
    )
    lines = [json.loads(line) for line in run("watch", results, "--json")[1].splitlines()]
    assert [line["kind"] for line in lines] == ["planned", "completed", "planned", "completed", "planned"]
    once = json.loads(run("watch", results, "--once", "--json")[1])
    assert (once["state"], len(once["table"])) == ("gone", 3)


def test_on_a_terminal_it_is_a_table_that_fits(results: Path) -> None:
    main, end = pty.openpty()
    termios.tcsetwinsize(end, (30, 100))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    with subprocess.Popen(
        command("watch", results), stdout=end, stdin=end, env=environment | {"TERM": "xterm"}
    ) as process:
        os.close(end)
        said = b""
        with contextlib.suppress(OSError):  # how the end of a pseudo-terminal is told
            while part := os.read(main, 4096):
                said += part
    os.close(main)
    assert process.returncode == 1
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode()).splitlines()
    assert "tiny: starting: 3 of 4 trials planned; 1 pending, 2 completed" in lines[0]
    assert lines[1].split() == ["trial", "S", "p", "ΔTe", "seed", "step", "FID", "state"]
    assert [line.split()[0] for line in lines[2:5]] == ["rigl-ab3", "rigl-aa1", "rigl-aa2"]
    assert any("go on with: raysparse resume" in line for line in lines)


def test_fids_of_other_protocols_are_neither_ranked_nor_put_side_by_side(run: Run, results: Path) -> None:
    _, out, _ = run("ls", results)
    assert "best of rigl (search): FID 16.000, rigl-aa1; measured in way 1" in out
    assert "best of rigl (search): FID 99.000, rigl-aa2; measured in way 2" in out
    found = json.loads(run("diff", results, "aa1", "aa2", "--json")[1])
    assert not found["comparable"]
    assert found["protocols_differ_in"] == {"generated": [16, 99]}
    assert found["settings"] == {"evaluate.generated": [16, 99]}
    assert found["fids"] == []
    assert "not comparable, the protocols differ: generated (16 and 99)" in run("diff", results, "aa1", "aa2")[1]
    assert "no records yet" in run("diff", results, "aa1", "ab3")[1]


def test_stopping_a_trial_that_nobody_drives_takes_effect_at_once(run: Run, results: Path) -> None:
    assert "at once" in run("stop", results, "ab3")[1]
    _, out, _ = run("show", results, "ab3")
    assert "stopped: by " in out
    assert f"next:           raysparse retry '{results}' rigl-ab3 && raysparse resume '{results}'" in out
    assert json.loads(run("retry", results, "ab3", "--json")[1])["reopened"] == ["rigl-ab3"]


def test_a_damaged_folder_hides_no_other_and_trials_without_a_sweep_are_listed(run: Run, results: Path) -> None:
    (results.parent / "broken").mkdir()
    (results.parent / "broken" / "sweep.json").write_text("{")
    record(results.parent / "alone", "rigl-ff9", 16, {"sparse": {"sparsity": 0.9}})
    code, out, _ = run("ls", results.parent, "--json")
    assert code == 0
    states = {one["name"]: one["state"] for one in json.loads(out)}
    assert states == {"alone": "trials", "broken": "damaged", "tiny": "gone"}
    _, out, _ = run("ls", results.parent)
    assert "damaged: " in out
    assert f"next: raysparse resume '{results}'" in out
    page = json.loads(run("show", results.parent / "alone", "ff9", "--json")[1])
    assert [(report["step"], report["fid"]) for report in page["reports"]] == [(16, 16.0)]


def test_metrics_writes_its_files_beside_the_sweeps(run: Run, results: Path) -> None:
    code, out, err = run("metrics", results.parent)
    assert code == 0
    assert all(Path(line).is_file() for line in out.splitlines())
    assert str(results / "metrics" / "targets.json") in (results.parent / "metrics" / "prometheus.yml").read_text()
    assert "prometheus --config.file=" in err
    files = json.loads(run("metrics", results, "--json")[1])["files"]
    assert all(Path(path).is_relative_to(results / "metrics") for path in files)
