"""A sweep on its way to a cluster: what is sent, and what is refused before anything is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from raysparse import cli, space
from raysparse.errors import UsageError
from raysparse.space import Sweep
from raysparse.sweep import auth, submit

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A token as it should be; what using it sets is undone."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
        monkeypatch.delenv(name)
    path = tmp_path / "token"
    path.write_text("0123456789abcdef")
    path.chmod(0o600)
    return path


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What would have gone to the cluster, and the files of the working directory."""
    taken: dict[str, Any] = {}

    class Client:
        def __init__(self, address: str) -> None:
            taken["address"] = address

        def submit_job(self, **job: Any) -> str:
            folder = Path(job["runtime_env"]["working_dir"])
            taken.update(job)
            taken["files"] = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
            if (folder / "sweep.yaml").exists():
                taken["sweep"] = (folder / "sweep.yaml").read_text()
            return str(job["submission_id"])

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Client)
    return taken


def test_the_job_holds_the_code_and_the_same_sweep(
    sweep_of: Callable[..., Sweep], token: Path, sent: dict[str, Any]
) -> None:
    sweep = sweep_of()
    job = submit.submit_sweep(sweep, NOBODY, output="/mnt/raysparse/results/other", token=token)

    assert sent["entrypoint"] == "python -m raysparse.cli sweep sweep.yaml --output /mnt/raysparse/results/other"
    assert space.parse(yaml.safe_load(sent["sweep"]), "sent").digest == sweep.digest
    assert {"sweep.yaml", "raysparse/cli/__main__.py", "raysparse/sweep/tuner.py", "analysis/report.py"} <= sent[
        "files"
    ]
    assert {name.split("/")[0] for name in sent["files"]} == {"sweep.yaml", "raysparse", "analysis"}
    assert not [name for name in sent["files"] if "__pycache__" in name or name.endswith(".pyc")]
    assert job.files == len(sent["files"])
    assert 10**5 < job.size_bytes < 10**7
    assert "pip" not in sent["runtime_env"]
    assert int(sent["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60  # time for checkpoints
    assert "0123456789abcdef" not in str(sent)
    assert job.job_id.startswith("tiny-")


def test_what_is_sent_runs_without_an_installation(tmp_path: Path) -> None:
    files, size = submit.add_code(tmp_path)
    assert files > 50
    assert size == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    code = "import analysis, raysparse; print(raysparse.__file__); print(analysis.__file__)"
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=plain, capture_output=True, text=True)
    assert [Path(line).parents[1] for line in done.stdout.split()] == [tmp_path, tmp_path], done.stderr
    done = subprocess.run(
        [*[sys.executable, "-m", "raysparse.cli"], "--version"], cwd=tmp_path, env=plain, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_code_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "UPLOAD_BYTES", 1000)
    with pytest.raises(UsageError, match="no code"):
        submit.add_code(tmp_path)


def test_resume_needs_no_sweep_file(token: Path, sent: dict[str, Any]) -> None:
    job = submit.submit_resume("/mnt/raysparse/results/big one", NOBODY, token=token)
    assert sent["entrypoint"] == "python -m raysparse.cli resume '/mnt/raysparse/results/big one'"
    assert "sweep.yaml" not in sent["files"]
    assert submit.next_steps(job)["go on"].startswith("raysparse submit --resume '/mnt/raysparse/results/big one'")


def test_requirements_are_installed_by_the_job(token: Path, sent: dict[str, Any], tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(
        "# pinned\ntorch==2.14.1\n\ndiffusers==0.42.1  # U-Nets\n--extra-index-url https://example.org/s\n"
    )
    submit.submit_resume("/results", NOBODY, token=token, requirements=requirements)
    wanted = ["torch==2.14.1", "diffusers==0.42.1", "--extra-index-url https://example.org/s"]
    assert sent["runtime_env"]["pip"] == wanted


@pytest.mark.parametrize("text", ["-e .", "-r other.txt", "./raysparse", "# nothing\n", "/home/me/wheel.whl"])
def test_requirements_of_this_machine_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "requirements.txt"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"requirement|this machine"):
        submit.read_requirements(path)
    with pytest.raises(UsageError, match="cannot read"):
        submit.read_requirements(tmp_path / "none.txt")


@pytest.mark.parametrize("rights", [0o640, 0o604, 0o644, 0o660, 0o601])
def test_a_token_that_others_have_rights_on_is_not_used(
    rights: int, sweep_of: Callable[..., Sweep], token: Path, sent: dict[str, Any]
) -> None:
    token.chmod(rights)
    with pytest.raises(UsageError, match=f"{rights:04o}.*chmod 600 {token}"):
        submit.submit_sweep(sweep_of(), NOBODY, token=token)
    assert not sent
    assert "RAY_AUTH_MODE" not in os.environ


def test_no_token_and_an_empty_token_are_refused(token: Path) -> None:
    with pytest.raises(UsageError, match=r"no token at .*--generate"):
        auth.use_token(token.with_name("none"))
    token.write_text("\n")
    with pytest.raises(UsageError, match="is empty"):
        auth.use_token(token)


def test_the_file_that_is_given_wins(token: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    assert auth.use_token() is None
    assert auth.use_token(token) == token
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(token)
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert auth.use_token() == token


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"data": {"name": "hershey", "source": "kanji.npz"}}, "base.data.source=/mnt/raysparse/kanji.npz"),
        ({"data": {"name": "hershey", "root": "data"}}, "base.data.root=/mnt/raysparse/data"),
        ({"sparse": {"teacher": "results/dense"}}, "base.sparse.teacher=/mnt/raysparse/dense"),
    ],
)
def test_a_file_of_this_machine_is_refused(changes: dict[str, Any], path: str, sweep_of: Callable[..., Sweep]) -> None:
    sweep = sweep_of()
    with pytest.raises(UsageError, match=path):
        submit.check_paths(sweep.model_copy(update={"base": sweep.base | changes}))
    submit.check_paths(sweep)


def test_a_teacher_of_this_machine_among_the_axes_is_refused(sweep_of: Callable[..., Sweep]) -> None:
    axes = {"nm_ste": {"teacher": ["/mnt/raysparse/dense", "results/dense"], "start": ["teacher"]}}
    with pytest.raises(UsageError, match=r"search\.axes\.nm_ste\.teacher is 'results/dense', a path on this machine"):
        submit.check_paths(sweep_of(search={"trials": 2, "axes": axes}))
    axes["nm_ste"]["teacher"].pop()
    submit.check_paths(sweep_of(search={"trials": 2, "axes": axes}))


def test_a_relative_results_folder_is_refused(
    sweep_of: Callable[..., Sweep], token: Path, sent: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=r"--output 'results/tiny' must be an absolute path"):
        submit.submit_sweep(sweep_of(), NOBODY, output="results/tiny", token=token)
    with pytest.raises(UsageError, match=r"--resume"):
        submit.submit_resume("tiny", NOBODY, token=token)
    assert not sent


@pytest.mark.parametrize(
    ("address", "clear"),
    [
        ("http://127.0.0.1:8265", False),
        ("http://localhost:8265", False),
        ("http://[::1]:8265", False),
        ("http://10.0.0.7:8265", True),
        ("http://head.example.org:8265", True),
        ("https://head.example.org", False),
    ],
)
def test_a_token_in_the_clear_is_noticed(address: str, clear: bool) -> None:
    assert submit.in_the_clear(address) == clear


def test_silence_and_wrong_addresses_say_what_to_do(token: Path) -> None:
    with pytest.raises(UsageError, match=r"no Ray dashboard answers at .*ray dashboard cluster.yaml"):
        submit.submit_resume("/results", NOBODY, token=token)
    with pytest.raises(UsageError, match=r"must be the dashboard's"):
        submit.submit_resume("/results", "127.0.0.1:6379", token=token)


def test_the_command_says_what_to_type_next(token: Path, sent: dict[str, Any]) -> None:
    words = ["submit", "tune_spaces/quickstart.yaml", "--address", "http://10.0.0.7:8265", "--token", str(token)]
    done = CliRunner().invoke(cli.app, [*words, "--set", "base.train.steps=480", "--set", "asha=null"])
    assert done.exit_code == 0, done.output
    job = done.stdout.strip()
    assert job == sent["submission_id"]
    assert yaml.safe_load(sent["sweep"])["base"]["train"]["steps"] == 480
    assert "results on the cluster in /mnt/raysparse/results/quickstart" in done.stderr
    assert f"RAY_AUTH_TOKEN_PATH={token} ray job logs --follow {job} --address http://10.0.0.7:8265" in done.stderr
    assert f"ray job stop {job}" in done.stderr
    assert "raysparse watch /mnt/raysparse/results/quickstart" in done.stderr
    assert "raysparse submit --resume /mnt/raysparse/results/quickstart" in done.stderr
    assert "MiB" in done.stderr
    assert "unencrypted" in done.stderr  # the address is no tunnel


@pytest.mark.parametrize("words", [[], ["--resume", "/r", "--output", "/o"], ["quickstart.yaml", "--accept-changes"]])
def test_options_that_do_not_go_together(words: list[str]) -> None:
    done = CliRunner().invoke(cli.app, ["submit", *words])
    assert isinstance(done.exception, UsageError)


def test_limits_and_changes_travel_along(token: Path, sent: dict[str, Any]) -> None:
    words = ["submit", "tune_spaces/quickstart.yaml", "--address", NOBODY, "--token", str(token), "--max-hours", "2.5"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert sent["entrypoint"].endswith("--output /mnt/raysparse/results/quickstart --max-hours=2.5")
    more = ["--resume", "/mnt/raysparse/results/quickstart", "--accept-changes", "--max-disk", "500GB"]
    done = CliRunner().invoke(cli.app, [*words, *more])
    assert done.exit_code == 0, done.output
    assert sent["entrypoint"] == (
        "python -m raysparse.cli resume /mnt/raysparse/results/quickstart --space sweep.yaml --max-hours=2.5 "
        "--max-disk=500GB --accept-changes"
    )
    more += ["--set", "search.trials=9", "--data", "/mnt/raysparse/kanji.npz"]
    done = CliRunner().invoke(cli.app, ["submit", "--address", NOBODY, "--token", str(token), *more])
    assert done.exit_code == 0, done.output
    assert sent["entrypoint"].endswith(
        "results/quickstart --max-disk=500GB --set=search.trials=9 "
        "'--set=base.data.source=\"/mnt/raysparse/kanji.npz\"' --accept-changes"
    )
