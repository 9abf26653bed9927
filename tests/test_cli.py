"""The command line: exit codes, words, and that results alone go to stdout."""

from __future__ import annotations

import errno
import io
import json
import sys
from pathlib import Path
from unittest import mock

import pytest

from raysparse import cli
from raysparse.errors import WorkerDied
from raysparse.sweep.board import Board
from raysparse.sweep.tuner import Summary

SPACES = Path(__file__).resolve().parents[1] / "tune_spaces"
QUICK = {
    "data.name": "hershey",
    "model.options.hidden": 8,
    "model.options.layers": 1,
    "train.steps": 4,
    "train.batch_size": 16,
    "evaluate.every_steps": 2,
    "evaluate.generated": 32,
    "evaluate.ddim_steps": 2,
    "evaluate.references": 64,
    "sparse.method": "rigl",
    "sparse.update_interval": 1,
}

DENSE = ("dense", None, None)
GRID = {"static": {"sparsity": [0.5]}}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory):
    """Run a command line; gives (exit code, stdout, stderr)."""
    monkeypatch.setenv("RAYSPARSE_DATA", str(tmp_path_factory.getbasetemp() / "cli-data"))

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["raysparse", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return call


def settings(**changes: object) -> list[str]:
    return [word for name, value in (QUICK | changes).items() for word in ("--set", f"{name}={value}")]


def test_version(run) -> None:
    assert run("--version")[:2] == (0, "0.1.0\n")


@pytest.mark.parametrize("command", [["train"], ["sweep", "tune_spaces/quickstart.yaml"], ["sample"]])
def test_a_place_that_cannot_be_written_is_told_without_a_traceback(run, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "thesis.tex").touch()
    place = tmp_path / "thesis.tex" / "out"
    if command == ["sample"]:
        assert run("train", *settings(), "--output", str(tmp_path / "trained"))[0] == 0
        command = ["sample", str(tmp_path / "trained"), "--count", "1"]
    code, out, err = run(*command, *(settings() if command == ["train"] else []), "--output", str(place))
    assert code == 2
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert str(tmp_path / "thesis.tex") in last
    assert last.endswith(("; check permissions and free space", "; give another folder"))
    assert "Traceback" not in err


def test_a_folder_in_the_place_of_a_file_is_told_without_a_traceback(run, tmp_path: Path) -> None:
    command = ["train", *settings(), "--output", str(tmp_path / "out")]
    assert run(*command)[0] == 0
    [record] = (tmp_path / "out" / "records").iterdir()
    record.unlink()
    record.mkdir()
    code, _, err = run(*command)
    assert (code, err) == (2, f"error: {record}: Is a directory; check permissions and free space\n")


def test_a_report_that_cannot_be_written_leaves_a_finished_sweep(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("raysparse.sweep.preparing.prepare", lambda *_, **__: None)
    monkeypatch.setattr("raysparse.sweep.tuner.run", lambda _, out, **__: Summary(out, Board(), interrupted=False))
    monkeypatch.setattr("analysis.report.write", full)
    code, out, err = run("sweep", "tune_spaces/quickstart.yaml", "--output", str(tmp_path / "my runs"))
    assert (code, out) == (2, "")
    assert "the sweep is finished; its report cannot be written: [Errno 28] No space left on device" in err
    assert err.endswith(f"try again: python -m analysis '{tmp_path / 'my runs'}'\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep", "absent.yaml"], "cannot read absent.yaml"),
        (["train", "--set", "sparse.sparcity=0.5"], "did you mean 'sparsity'"),
        (["train", "--set", "sparse.method=static", "--set", "sparse.sparsity=1"], "[0, 1)"),
        (["train", "--set", "train.steps"], "--set takes KEY=VALUE"),
        (["train", "--set", "train.steps=[1"], "not a YAML value"),
        (["train", "--set", "data.name=2024-13-45"], "'2024-13-45' is not a YAML value"),
        (["train", "--set", "data.options=" + "[" * 9_999], "is not a YAML value"),
        (["train", "--set", "model.options.hiden=3"], "did you mean 'hidden'"),
        (["train", "--set", "data.name=hershy"], "did you mean 'hershey'"),
        (["train", "--set", "evaluate.extractor=none"], "unknown extractor"),
        (["train", "--data", "absent.npz", "--set", "data.name=kanjivg"], "absent.npz"),
        (["prepare", "kanjivg", "--path", "absent.npz"], "absent.npz"),
        (["prepare", "nothing"], "unknown dataset 'nothing'"),
        (["cost"], "give a sweep file or --model"),
        (["cost", "--model", "chirodif"], "did you mean 'chirodiff'"),
        (["cost", "--model", ""], "model.name"),
        (["cost", "--model", "autoencoder"], "is a first stage, not a denoiser"),
        (["cost", "--model", "uvit", "--method", "rigle"], "did you mean 'rigl'"),
        (["cost", "--model", "chirodiff", "--points", "0"], "--points must be above 0"),
        (["cost", "--model", "chirodiff", "--points", "nan"], "--points must be above 0"),
        (["cost", "--model", "chirodiff", "--points", "1e300"], "at most 100000"),
        (["cost", "--model", "uvit", "--set", "sparse.sparsity=[0.5]"], "sparsity: got [0.5]"),
        (["cost", "--model", "uvit", "--set", "sparse.patern=nm"], "did you mean 'pattern'"),
        (["cost", "--model", "chirodiff", "--method", "timesteps", "--set", "sparse.ranges=0-9:0.5"], "end at 9, but"),
        (["sample", "absent", "--output", "absent", "--count", "100000000000"], "10000000 "),
        (["resume", "absent"], "absent"),
        (["nonsense"], "nonsense"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(run, words: list[str], message: str) -> None:
    code, out, err = run(*words)
    assert code == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("content", "words", "asked"),
    [
        ({"sparse": {"method": "rigl", "sparsity": 0.8}}, [], [DENSE, ("rigl", 0.8, "erk")]),
        ({"sparse": {"method": "rigl", "sparsity": 0.8, "allocation": "er"}}, [], [DENSE, ("rigl", 0.8, "er")]),
        ({"sparse": {"method": "rigl", "sparsity": 0.8}}, ["--sparsity", "0.5"], [DENSE, ("rigl", 0.5, "erk")]),
        ({"sparse": {"method": "rigl", "sparsity": 0.8}}, ["--method", "set"], [DENSE]),
        ({"base": {"sparse": {"allocation": "er"}}, "grid": GRID}, [], [DENSE, ("static", 0.5, "er")]),
        ({"grid": {"static": {"sparsity": ["0.5", None]}}}, [], [DENSE, ("static", 0.5, "erk")]),
        ({"base": {}, "grid": GRID}, ["--allocation", "uniform"], [DENSE, ("static", 0.5, "uniform")]),
    ],
)
def test_cost_is_of_what_the_file_says(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object, words: list[str], asked: list[object]
) -> None:
    (tmp_path / "file.yaml").write_text(json.dumps(content))
    seen = []
    monkeypatch.setattr(
        "raysparse.train.plan.cost_row",
        lambda trial, _: seen.append((trial.sparse.method, trial.sparse.sparsity, trial.sparse.allocation)),
    )
    assert run("cost", str(tmp_path / "file.yaml"), *words, "--json")[0] == 0
    assert seen == asked


def test_cost_prints_the_papers_counts(run) -> None:
    code, out, _ = run("cost", "--model", "chirodiff", "--points", "88.6", "--sparsity", "0.5", "--json")
    dense, half = json.loads(out)["rows"]
    assert code == 0
    assert dense["params_total"] == 416_859
    assert f"{dense['flops_inference_paper']:.2e}" == "7.32e+09"  # printed: 7.35e9, at the paper's own mean length
    assert half["flops_inference_true"] / dense["flops_inference_true"] == pytest.approx(0.5, abs=1e-3)
    table = run("cost", "--model", "chirodiff", "--points", "88.6", "--sparsity", "0.5")[1]
    assert "416,859" in table
    assert "0.5000" in table


def test_a_terminal_without_greek_letters_gets_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys.modules["raysparse.cli.app"], "app", lambda: shown.write("ΔTe 50\n"))
    cli.main()
    shown.seek(0)
    assert shown.read() == "?Te 50\n"


def test_cost_of_a_trial_file_is_that_of_its_own_method(run, tmp_path: Path) -> None:
    path = tmp_path / "trial.yaml"
    path.write_text("{data: {name: hershey}, sparse: {method: rigl, sparsity: 0.9}}")
    dense, own = json.loads(run("cost", str(path), "--points", "40", "--json")[1])["rows"]
    assert own["params_active"] < 0.2 * dense["params_active"]
    assert len(json.loads(run("cost", str(path), "--points", "40", "--sparsity", "0.5", "--json")[1])["rows"]) == 2


def test_train_writes_records_and_goes_on_where_it_stopped(run, tmp_path: Path) -> None:
    code, out, err = run("train", "--output", str(tmp_path), *settings(), "--json")
    assert code == 0
    record = json.loads(out)
    assert (record["state"], record["step"], record["method"]) == ("COMPLETED", 4, "rigl")
    assert "step 2/4" in err
    assert "step 4/4" in err
    # Again: it is at its end, so nothing is trained and the record stays.
    code, out, err = run("train", "--output", str(tmp_path), *settings())
    assert code == 0
    assert "step" not in err
    assert Path(out.strip()).is_file()


def test_a_worker_that_was_killed_is_told_without_a_traceback(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raysparse.train import ranks

    died = WorkerDied("worker 0 died with exit code -9; the work ended, run it again to resume")
    monkeypatch.setattr(ranks, "run", mock.Mock(side_effect=died))
    code, out, err = run("train", "--output", str(tmp_path), *settings())
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == f"error: {died}"


def test_an_output_that_cannot_be_written_is_told_before_the_work(run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trained, nowhere = str(tmp_path / "trained"), str(tmp_path / "file" / "below")
    assert run("train", "--output", trained, *settings(**{"train.steps": 1}))[0] == 0
    for words in (
        ["train", "--output", nowhere, *settings()],
        ["train", "--output", str(tmp_path / "file"), *settings()],
        ["sweep", "tune_spaces/quickstart.yaml", "--output", nowhere],
        ["sweep", "tune_spaces/quickstart.yaml", "--output", "/proc/raysparse"],  # ENOENT: nothing can be made there
        ["sample", trained, "--output", nowhere + "/pictures"],
        ["evaluate", trained, "--pictures", str(tmp_path / "file"), "--again"],
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, "")
        assert "cannot write to" in err


def test_a_sweeps_output_is_checked_before_its_data_are_prepared(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raysparse.sweep import folder

    prepare = mock.Mock(side_effect=AssertionError("the data were prepared"))
    monkeypatch.setattr("raysparse.sweep.preparing.prepare", prepare)
    (tmp_path / "file").write_text("")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    sweep = ["sweep", str(SPACES / "quickstart.yaml"), "--output"]
    for place, message in (("file/below", "cannot write to"), ("file", "is a file"), ("thesis", "is not empty")):
        code, out, err = run(*sweep, str(tmp_path / place))
        assert (code, out) == (2, "")
        assert message in err
    with folder.locked(tmp_path / "busy"):
        code, _, err = run(*sweep, str(tmp_path / "busy"))
    assert code == 2
    assert "another process drives the sweep" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "thesis"]


def test_a_sweep_file_lends_train_its_base_and_what_the_method_has_of_the_shared_settings(tmp_path: Path) -> None:
    dense = cli.load_trial(SPACES / "quickstart.yaml", None, None)
    assert dense.sparse.method == "dense"
    assert dense.model.options == {"hidden": 32, "layers": 2, "inputs": "del"}
    rigl = cli.load_trial(SPACES / "quickstart.yaml", ["sparse.method=rigl", "sparse.sparsity=0.9"], tmp_path)
    assert (rigl.sparse.update_interval, rigl.sparse.sparsity) == (40, 0.9)
    assert rigl.data.source == str(tmp_path)


@pytest.mark.parametrize("name", sorted(path.name for path in SPACES.glob("*.yaml")))
def test_every_sweep_file_that_ships_is_valid(name: str) -> None:
    from raysparse import space

    loaded = space.load(SPACES / name)
    assert loaded.name == name.removesuffix(".yaml")
    assert "dense" in loaded.axes
    for point in space.grid_points(loaded):
        space.trial(loaded, point)


def test_a_dry_run_prints_the_plan_and_starts_nothing(run, tmp_path: Path) -> None:
    words = ["sweep", str(SPACES / "vmnist.yaml"), "--dry-run", "--set", "base.evaluate.extractor=oriented_energy"]
    code, out, _ = run(*words, "--json", "--output", str(tmp_path / "r"))
    plan = json.loads(out)
    assert code == 0
    assert plan["search_trials"] == len(plan["trials"]) == 56
    assert {row["params_total"] for row in plan["trials"]} == {65_019}
    assert plan["hours_asha"] < plan["hours_full"]
    assert not (tmp_path / "r").exists()
    assert "56 trials" in run(*words)[1]
