"""cluster.yaml for real, without a cloud: its own start command, its node types started and ended by the autoscaler.

The provider alone is exchanged: Ray's fake one starts a raylet of this machine for every worker. `AutoscalingCluster`
and `ray stop` would end every Ray of the machine, so what is started here is ended here, by process id.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysparse.results import read_trial
from raysparse.space import Sweep
from raysparse.sweep import autoscaling
from raysparse.sweep.journal import read

ROOT = Path(__file__).resolve().parents[2]
HEAD_ID = "f" * 51 + "00000"  # the fake provider counts its nodes up from here
PROVIDER = """
from ray._private import ray_constants
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class Provider(FakeMultiNodeProvider):
    # A machine unpacks a job's working directory on its own disk. The fake ones have one disk, and each new one would
    # remove the folder in which the others work.
    def _create_node_with_resources_and_labels(self, *arguments):
        with self.lock:
            ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME = f"runtime_resources_{self._next_node_id + 1}"
            super()._create_node_with_resources_and_labels(*arguments)
"""
HEADS_OWN = ("RAY_CLOUD_INSTANCE_ID", "RAY_OVERRIDE_NODE_ID_FOR_TESTING")
STEPS = 100  # long enough to be stopped in the middle
SMALL_MEMORY = 100_000_000  # bytes of object store per raylet; Ray's default is a third of the machine each


@dataclasses.dataclass(frozen=True)
class Head:
    home: Path
    token: Path
    dashboard: str
    environment: dict[str, str]

    def get(self, path: str, token: str | None, body: dict[str, Any] | None = None) -> Any:
        """The dashboard's answer as JSON; an HTTPError where it refuses."""
        request = urllib.request.Request(self.dashboard + path, None if body is None else json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def nodes(self) -> list[tuple[str, dict[str, float]]]:
        """State and resources of every node that there is or was."""
        found = self.get("/nodes?view=summary", self.token.read_text())["data"]["summary"]
        return [(node["raylet"]["state"], node["raylet"].get("resourcesTotal", {})) for node in found]

    def alive(self) -> int:
        return sum(state == "ALIVE" for state, _ in self.nodes())

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A command of a person at another machine: nothing of the head's environment."""
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY")}
        plain["HOME"] = str(self.home / "elsewhere")
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, "-m", *words], cwd=ROOT, env=plain, stdout=pipe, stderr=pipe, text=True
        )

    def submit(self, *words: str) -> subprocess.Popen[str]:
        return self.start("raysparse.cli", "submit", *words, "--address", self.dashboard)


def said(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of what has ended soon."""
    try:
        out, err = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    return process.returncode, out, err


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """The head of cluster.yaml with its own start command, on ports that are free here."""
    from ray.autoscaler._private.util import prepare_config

    home = Path(tempfile.mkdtemp(prefix="rscloud", dir="/tmp"))  # short: its sockets' names allow 107 bytes
    token = home / ".ray" / "auth_token"  # where cluster.yaml's file_mounts put it
    token.parent.mkdir()
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    cluster = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8")))
    command, ports = start_command(cluster, "head", home)
    (home / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(with_fake_provider(cluster, ports["port"])))
    (home / "fake_provider.py").write_text(PROVIDER)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY")} | {
        "HOME": str(home),
        "PYTHONPATH": str(home),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # the image's python and ray
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",  # the first version ends fake nodes as soon as they are up
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_worker_prestart": "0",  # else a process per CPU that a node claims to have
        "RAY_prestart_worker_first_driver": "0",
    }
    with (home / "head.log").open("w") as log:
        process = subprocess.Popen(
            ["sh", "-c", f"{command} --temp-dir={home}/r"],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=home,
        )
    try:
        started = Head(home, token, f"http://127.0.0.1:{ports['dashboard-port']}", environment)
        wait_for(lambda: answers(started, process), 60, lambda: (home / "head.log").read_text()[-3000:])
        yield started
    finally:
        end(process, home)


@pytest.fixture
def space(sweep_of: Callable[..., Sweep], tmp_path: Path) -> Path:
    """Two trials, dense and sparse, each as large as to need a worker for itself."""
    sweep = sweep_of(
        search=None, asha=None, confirm=None, grid={"static": {"sparsity": [0.5]}}, resources={"cpus_per_worker": 3}
    )
    content = sweep.model_dump(mode="json", exclude_none=True)
    content["base"]["train"]["steps"] = STEPS
    content["base"]["evaluate"]["every_steps"] = 5
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def start_command(cluster: dict[str, Any], kind: str, home: Path) -> tuple[str, dict[str, int]]:
    """cluster.yaml's command with free ports, small, in the foreground; and which port is which."""
    (command,) = [line for line in cluster[f"{kind}_start_ray_commands"] if "ray start" in line]
    ports = {}
    options = re.findall(r"--([a-z-]*port)=\d+", command)
    for option, number in zip(options, free_ports(len(options)), strict=True):
        ports[option] = number
        command = re.sub(rf"--{option}=\d+", f"--{option}={number}", command)
    command = command.replace("/mnt/raysparse", str(home / "shared"))
    return f"{command} --object-store-memory={SMALL_MEMORY} --block", ports


def with_fake_provider(cluster: dict[str, Any], port: int) -> dict[str, Any]:
    """The same node types, started as raylets of this machine; idle for 3 s instead of minutes."""
    kinds = {
        name: kind | {"node_config": {}, "resources": kind["resources"] | {"object_store_memory": SMALL_MEMORY}}
        for name, kind in cluster["available_node_types"].items()
    }
    provider = {
        "type": "external",
        "module": "fake_provider.Provider",
        "gcs_address": f"127.0.0.1:{port}",
        "head_node_id": HEAD_ID,
        "launch_multiple": True,
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    changed = {"provider": provider, "available_node_types": kinds, "docker": {}, "idle_timeout_minutes": 0.05}
    return cluster | changed


def free_ports(count: int) -> list[int]:
    """So many different free ones outside 10002-19999, the range of Ray's workers."""
    found: list[int] = []
    with contextlib.ExitStack() as held:
        while len(found) < count:
            probe = held.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            number = int(probe.getsockname()[1])
            found += [] if 10002 <= number <= 19999 else [number]
    return found


def answers(head: Head, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, (head.home / "head.log").read_text()[-3000:]
    try:
        return head.alive() == 1
    except OSError:
        return False


def wait_for(what: Any, seconds: float, say: Any) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, say()
        time.sleep(0.3)


def processes() -> dict[int, tuple[int, int]]:
    """Parent and session of every process of this machine."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()
                if state[0] != "Z":
                    found[int(entry.name)] = (int(state[1]), int(state[3]))
    return found


def started_by(process: subprocess.Popen[bytes], home: Path) -> set[int]:
    """What runs in the head's session, what that started in sessions of its own, and what names our folder."""
    found = processes()
    ours = in_session(process.pid)
    for number in found:
        with contextlib.suppress(OSError):
            if str(home).encode() in Path(f"/proc/{number}/cmdline").read_bytes():
                ours.add(number)
    while True:
        more = {number for number, (parent, _) in found.items() if parent in ours} - ours
        if not more:
            return ours - {os.getpid()}
        ours |= more


def in_session(leader: int) -> set[int]:
    return {number for number, (_, session) in processes().items() if session == leader}


def end(process: subprocess.Popen[bytes], home: Path) -> None:
    """Every process that was started, by its id; nothing may be left."""
    deadline = time.monotonic() + 20
    while ours := started_by(process, home):
        for number in ours:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.poll()
        assert time.monotonic() < deadline, f"these do not end: {ours}"
        time.sleep(0.2)
    process.wait(10)
    shutil.rmtree(home, ignore_errors=True)


def test_room_counts_what_the_autoscaler_may_still_start() -> None:
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    nodes = autoscaling.nodes_of(cluster)
    assert nodes == [{"CPU": 0}] + [{"CPU": 4, "GPU": 1}] * 8
    cluster["available_node_types"]["cpu.spot"] = {"resources": {"CPU": 32}, "max_workers": 5}
    cluster["max_workers"] = 9  # of the whole cluster: the GPUs first
    assert autoscaling.nodes_of(cluster) == [{"CPU": 0}] + [{"CPU": 4, "GPU": 1}] * 8 + [{"CPU": 32}]
    assert autoscaling.nodes_of({"available_node_types": {}, "head_node_type": "head"}) is None
    assert autoscaling.nodes_of({}) is None


@pytest.mark.ray
@pytest.mark.slow
def test_a_submission_without_the_clusters_token_is_refused(head: Head, space: Path, tmp_path: Path) -> None:
    before = head.get("/api/jobs/", head.token.read_text())

    with pytest.raises(urllib.error.HTTPError, match="401"):
        head.get("/api/jobs/", None, {"entrypoint": f"touch {tmp_path / 'ran'}"})
    other = tmp_path / "other"
    other.write_text(secrets.token_hex(32))
    other.chmod(0o600)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        head.get("/api/jobs/", other.read_text(), {"entrypoint": f"touch {tmp_path / 'ran'}"})
    touch = shlex.join(["touch", str(tmp_path / "ran")])
    code, out, err = said(head.start("ray.scripts.scripts", "job", "submit", "--address", head.dashboard, "--", touch))
    assert code != 0
    assert "uthentication" in out + err

    code, _, err = said(head.submit(str(space)))
    assert code == 2, err
    assert "no token at" in err
    code, _, err = said(head.submit(str(space), "--token", str(other)))
    assert code == 2, err
    assert "refuses the token" in err
    assert "Traceback" not in err

    assert head.get("/api/jobs/", head.token.read_text()) == before
    assert not (tmp_path / "ran").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_of_cluster_yaml_joins_by_its_own_command(head: Head) -> None:
    bootstrap = yaml.safe_load((head.home / "ray_bootstrap_config.yaml").read_text())
    command, _ = start_command(bootstrap, "worker", head.home)
    port = bootstrap["provider"]["gcs_address"].rpartition(":")[2]
    plain = {name: value for name, value in head.environment.items() if name not in HEADS_OWN}
    worker = subprocess.Popen(
        ["sh", "-c", command.replace(":6379", f":{port}") + " --num-cpus=1"],
        env=plain | {"RAY_HEAD_IP": "127.0.0.1"},
        cwd=head.home,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: head.alive() == 2, 40, head.nodes)
    finally:
        for number in in_session(worker.pid):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(number, signal.SIGTERM)
        worker.wait(20)
    wait_for(lambda: head.alive() == 1, 40, head.nodes)


@pytest.mark.ray
@pytest.mark.slow
def test_the_doctor_examines_a_cluster_through_its_dashboard(head: Head) -> None:
    (head.home / "shared").mkdir(exist_ok=True)
    words = ["--address", head.dashboard, "--token", str(head.token), "--storage", str(head.home / "shared"), "--json"]
    code, out, err = said(head.start("raysparse.cli", "doctor", *words))
    assert code == 0, out + err
    found = {row["name"]: (row["status"], row["found"]) for row in json.loads(out)["checks"]}
    assert found["nodes"][1].startswith("only the head is up")
    assert found["token"] == ("ok", "without a token the Jobs API answers 401; every node has RAY_AUTH_MODE=token")
    assert found["token file"][0] == "ok"
    assert found["bind address"] == (
        "ok",
        "dashboard and Jobs API listen on this machine alone, reached by a tunnel",
    )
    assert found["storage"] == ("ok", f"{head.home / 'shared'} is writable on 1 node")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_submitted_sweep_scales_up_is_stopped_goes_on_and_scales_back_to_nothing(head: Head, space: Path) -> None:
    (resources,) = [found for state, found in head.nodes() if state == "ALIVE"]
    assert not {"CPU", "GPU"} & set(resources)  # the head does no work
    results = head.home / "shared" / "results" / "tiny"
    where = ["--token", str(head.token), "--follow", "--json"]

    first = head.submit(str(space), "--output", str(results), *where)
    most = watch(head, first, lambda: "report" in kinds(results))
    job = json.loads(first.stdout.readline() if first.stdout else "")
    assert job["results"] == str(results)
    head.get(f"/api/jobs/{job['job']}/stop", head.token.read_text(), {})
    code, _, err = said(first)
    assert code == 130, err  # stopped, as by Ctrl-C
    assert "stopped" in err
    assert f"stop {job['job']}" in err
    assert f"raysparse submit --resume {results}" in err
    assert "INFO" not in err.split("submitted to")[0]
    assert kinds(results)[-1] == "interrupted"  # it had the time to save its trials

    second = head.submit("--resume", str(results), "--accept-changes", *where)
    most = max(most, watch(head, second, lambda: False))
    code, _, err = said(second)
    assert code == 0, err
    assert most == 2  # a worker per trial
    assert kinds(results)[-1] == "finished"
    assert kinds(results).count("completed") == 2
    for record in (results / "records").glob("*.parquet"):
        assert read_trial(record).column("step").to_pylist() == list(range(5, STEPS + 1, 5))
    assert (results / "report" / "report.html").is_file()

    wait_for(lambda: head.alive() == 1, 60, head.nodes)


def watch(head: Head, submission: subprocess.Popen[str], until: Callable[[], bool]) -> int:
    """The most workers at a time that were there until then, or until the submission has ended."""
    most, deadline = 0, time.monotonic() + 120
    while submission.poll() is None and not until():
        assert time.monotonic() < deadline, head.nodes()
        most = max(most, head.alive() - 1)
        time.sleep(0.5)
    return most


def kinds(results: Path) -> list[str]:
    """The kinds of the sweep's events so far."""
    path = results / "journal.jsonl"
    return [item.kind for item in read(path)] if path.exists() else []
