"""Hand a sweep to a cluster: `ray job submit` with a working directory of nothing but this code and the sweep file.

The job runs on the head node and drives the sweep from there; the machine that submitted it may go away. Its results
folder is on storage that every node sees, so `--resume` goes on with it from anywhere, whatever was lost.

The Jobs API runs whatever it is sent, as the user that Ray runs as. What protects it is the token (auth.py) and a
dashboard that listens on 127.0.0.1 only.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import ipaddress
import logging
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import yaml

from raysparse import space
from raysparse.errors import UsageError
from raysparse.space import Sweep
from raysparse.sweep import auth

SHARED = PurePosixPath("/mnt/raysparse")  # where cluster.yaml mounts the storage that all nodes share
PACKAGES = ("raysparse", "analysis")
STOP_WAIT_S = 120  # `ray job stop` sends SIGTERM, then after 3 s SIGKILL unless told; a sweep saves checkpoints first
UPLOAD_BYTES = 100 * 2**20  # the code is 2 MB: more is something that lies in its folder by mistake
RECONNECT_S = 2.0
RUN = ("python", "-m", "raysparse.cli")


@dataclasses.dataclass(frozen=True)
class Submission:
    """A job that the cluster has taken."""

    job_id: str
    address: str
    results: str | None  # as the cluster's machines see it
    token: Path | None
    files: int  # of the working directory
    size_bytes: int

    def ray_command(self, *words: str) -> str:
        """A `ray job` command that a person can type here."""
        default = self.token is None or self.token == Path("~/.ray/auth_token").expanduser()
        where = "" if default else f"RAY_AUTH_TOKEN_PATH={shlex.quote(str(self.token))} "
        return f"RAY_AUTH_MODE=token {where}" + shlex.join(["ray", "job", *words, "--address", self.address])


def submit_sweep(
    sweep: Sweep,
    address: str,
    *,
    output: str | None = None,
    options: Sequence[str] = (),
    token: Path | None = None,
    requirements: Path | None = None,
) -> Submission:
    """Submit a new sweep.

    output: results folder as the cluster sees it, absolute, on shared storage; None: /mnt/raysparse/results/NAME.
    options: more words for `raysparse sweep`, such as `--max-hours 5`.
    requirements: a requirements.txt that every node installs first; None: the image has what is needed.
    UsageError for a path that the cluster cannot have, a token that is missing or open to others, and no answer.
    """
    results = cluster_path(output, "--output") if output else str(SHARED / "results" / sweep.name)
    with tempfile.TemporaryDirectory(prefix="raysparse-submit-") as name:
        words = ["sweep", _add_sweep(Path(name), sweep), "--output", results, *options]
        return submit(
            Path(name), words, address, name=sweep.name, results=results, token=token, requirements=requirements
        )


def submit_resume(
    results: str,
    address: str,
    *,
    sweep: Sweep | None = None,
    options: Sequence[str] = (),
    token: Path | None = None,
    requirements: Path | None = None,
) -> Submission:
    """Go on with the sweep in a results folder, named as the cluster sees it. sweep: where it has changed.

    options: more words for `raysparse resume`. The rest as `submit_sweep`.
    """
    results = cluster_path(results, "--resume")
    with tempfile.TemporaryDirectory(prefix="raysparse-submit-") as name:
        changed = ["--space", _add_sweep(Path(name), sweep)] if sweep else []
        return submit(
            Path(name),
            ["resume", results, *changed, *options],
            address,
            name=PurePosixPath(results).name,
            results=results,
            token=token,
            requirements=requirements,
        )


def _add_sweep(stage: Path, sweep: Sweep) -> str:
    """Put the sweep into the working directory; its name there."""
    check_paths(sweep)
    content = yaml.safe_dump(sweep.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    (stage / "sweep.yaml").write_text(content, encoding="utf-8")
    return "sweep.yaml"


def submit(
    stage: Path,
    words: Sequence[str],
    address: str,
    *,
    name: str,
    results: str | None = None,
    token: Path | None = None,
    requirements: Path | None = None,
) -> Submission:
    """Submit `raysparse WORDS` with the folder `stage`, to which this code is added."""
    used = auth.use_token(token)
    environment: dict[str, Any] = {
        "working_dir": str(stage),
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
    }
    if requirements is not None:
        environment["pip"] = read_requirements(requirements)
    files, size = add_code(stage)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")[:-3]
    with _answers(address), _client(address) as client:
        job_id = client.submit_job(
            entrypoint=shlex.join([*RUN, *words]),
            submission_id=f"{name}-{stamp}",
            runtime_env=environment,
            metadata={"raysparse": name, "results": results or ""},
        )
    return Submission(str(job_id), address, results, used, files, size)


def follow(submission: Submission, show: Callable[[str], None]) -> str:
    """Hand what the job prints to `show`, as it prints it, until it has ended; its state then: SUCCEEDED, FAILED or
    STOPPED. UsageError where the cluster no longer answers."""
    import aiohttp

    shown = 0
    with _client(submission.address) as client, closing(asyncio.new_event_loop()) as loop:
        while True:
            seen = 0
            lines = client.tail_job_logs(submission.job_id)
            try:
                while True:
                    text = loop.run_until_complete(anext(lines))
                    new = text[max(shown - seen, 0) :]  # after a broken connection it begins at the beginning again
                    seen += len(text)
                    shown = max(shown, seen)
                    if new:
                        show(new)
            except StopAsyncIteration:
                pass
            except (RuntimeError, OSError, aiohttp.ClientError):  # it broke, as tunnels do; the job is asked for below
                time.sleep(RECONNECT_S)
            with _answers(submission.address):
                state = client.get_job_status(submission.job_id)
            if state.is_terminal():
                return str(state.value)


def add_code(stage: Path) -> tuple[int, int]:
    """Copy the packages that a sweep imports into a folder; the number of files in it then, and their bytes.

    UsageError where that is more than any code.
    """
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        if found is None or not found.submodule_search_locations:
            raise UsageError(f"the package {package} is not to be found: install raysparse, or run it from its folder")
        source = Path(next(iter(found.submodule_search_locations)))
        shutil.copytree(source, stage / package, ignore=shutil.ignore_patterns("__pycache__", "*.py[co]", ".*"))
    sizes = [path.stat().st_size for path in stage.rglob("*") if path.is_file()]
    if sum(sizes) > UPLOAD_BYTES:
        raise UsageError(
            f"the working directory has {sum(sizes) / 2**20:.0f} MiB, at most {UPLOAD_BYTES / 2**20:.0f} are "
            f"sent: what lies in {', '.join(PACKAGES)} that is no code?"
        )
    return len(sizes), sum(sizes)


def cluster_path(text: str, option: str) -> str:
    """An absolute path on the cluster. UsageError for a relative one: a job's own folder is removed with the job."""
    if not PurePosixPath(text).is_absolute():
        raise UsageError(
            f"{option} {text!r} must be an absolute path as the cluster's machines see it, on storage that all of them "
            f"share, such as {SHARED}/results/NAME: a relative one would lie in the job's folder and go with it"
        )
    return text


def check_paths(sweep: Sweep) -> None:
    """UsageError for a file of this machine in the sweep: it is not sent along, the cluster needs it on its storage."""

    def checked(where: str, place: str) -> str:
        if PurePosixPath(place).is_absolute():
            return place
        there = SHARED / PurePosixPath(place).name
        say = f"say --set {where}={there}" if where.startswith("base.") else f"name it {there} in {where}"
        raise UsageError(
            f"{where} is {place!r}, a path on this machine, and data is not sent with a job: copy it to the cluster's "
            f"storage (`ray rsync-up cluster.yaml {place} {SHARED}/`) and {say}"
        )

    space.with_places(sweep, checked)


def read_requirements(path: Path) -> list[str]:
    """The lines of a requirements.txt. UsageError where it cannot be read or refers to files of this machine."""
    try:
        lines = [line.split(" #")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the requirements {path}: {error}") from error
    wanted = [line for line in lines if line and not line.startswith("#")]
    for line in wanted:
        if line.startswith(("-r", "-c", "-e", "--requirement", "--constraint", "--editable", ".", "/", "file:")):
            raise UsageError(f"{path}: {line!r} refers to a file of this machine, which the cluster does not have")
    if not wanted:
        raise UsageError(f"{path} names no requirement")
    return wanted


def in_the_clear(address: str) -> bool:
    """Whether a token sent there crosses a network unencrypted: http to another machine than this one."""
    parts = urlsplit(address)
    if parts.scheme != "http":
        return False
    host = parts.hostname or ""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"


@contextmanager
def _client(address: str) -> Iterator[Any]:
    if urlsplit(address).scheme not in ("http", "https"):
        raise UsageError(
            f"--address {address!r} must be the dashboard's, http://HOST:PORT: `ray dashboard cluster.yaml` opens a "
            "tunnel to it at http://127.0.0.1:8265"
        )
    try:
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise UsageError(f"this needs Ray here as well: pip install 'ray[default]' ({error})") from error

    for logger in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(logger).setLevel(logging.WARNING)  # they tell of the upload and of sockets
    with _answers(address):
        client = JobSubmissionClient(address)
    yield client


@contextmanager
def _answers(address: str) -> Iterator[None]:
    """A refusal or silence of the other side, in words."""
    import requests
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise UsageError(refusal(address, error)) from error
    except (ConnectionError, requests.exceptions.RequestException) as error:
        raise UsageError(
            f"no Ray dashboard answers at {address}: is the tunnel open? `ray dashboard cluster.yaml` opens it at "
            f"http://127.0.0.1:8265, `ray up cluster.yaml` starts the cluster ({_first_line(error)})"
        ) from error
    except RuntimeError as error:
        if "401" in str(error) or "403" in str(error) or "uthenticat" in str(error):
            raise UsageError(refusal(address, error)) from error
        raise UsageError(f"the cluster at {address} did not take the job: {_first_line(error)}") from error


def refusal(address: str, error: BaseException) -> str:
    """What to do about a token that was not accepted."""
    return (
        f"the cluster at {address} refuses the token: it was started with another one; give the file of that one with "
        f"--token FILE ({_first_line(error)})"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def next_steps(submission: Submission) -> Mapping[str, str]:
    """What a person may want to type next, by purpose."""
    steps = {"logs": submission.ray_command("logs", "--follow", submission.job_id)}
    if submission.results:
        results = shlex.quote(submission.results)
        steps["watch"] = f"raysparse watch {results}  (where that folder is mounted)"
        steps["go on"] = f"raysparse submit --resume {results} --address {submission.address}"
    steps["stop"] = submission.ray_command("stop", submission.job_id)
    return steps
