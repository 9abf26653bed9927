"""A sweep's results folder: what lies where, whose it is, and one driver at a time.

sweep.json        the sweep file's whole content, its digest, versions, the command
journal.jsonl     every event (journal.py)
lock              held by the driver that works here
records/          one Parquet file per trial (raysparse.results)
trials/<id>/      trial.json, reports.jsonl, samples/ (trainable.py), log.txt (trial_log.py), hung.txt (pulse.py)
requests/         what a person asks of a driver that runs (control.py)
tensorboard/<id>/ event files over optimizer steps (event_files.py)
metrics/          where Prometheus finds the sweep's nodes (gauges.py)
checkpoints/<id>/ the last two of a trial
optuna/study.log  the search as an ordinary Optuna journal storage
tune/             Ray Tune's folder: TensorBoard event files, progress.csv and result.json per trial
train/            Ray Train, for trials of several workers
ray.log           what Ray has to say
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import platform
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raysparse import space
from raysparse.errors import UsageError
from raysparse.files import check_writable, write_text
from raysparse.space import Sweep
from raysparse.sweep.board import Board


class Busy(UsageError):
    """Another process drives the sweep."""


def refuse_if_taken(results: Path, sweep: Sweep) -> None:
    """UsageError where the folder is another sweep's or something else, or this sweep has begun or ended there."""
    if (results / "sweep.json").is_file():
        other, quoted = read(results), shlex.quote(str(results))
        if other["digest"] != sweep.digest:
            name = other["sweep"].get("name")
            changed = f", or where its file has changed: raysparse resume {quoted} --space FILE" * (name == sweep.name)
            raise UsageError(
                f"{results} belongs to another sweep, {name!r} with digest {other['digest'][:12]} (this one: "
                f"{sweep.name!r}, {sweep.digest[:12]}); give another folder{changed}"
            )
        if Board.load(results).finished:
            raise UsageError(
                f"the sweep {sweep.name!r} is finished in {results}; its report: python -m analysis {quoted}; "
                "to run it again give another folder"
            )
        raise UsageError(f"the sweep {sweep.name!r} has begun in {results}; go on with: raysparse resume {quoted}")
    if results.exists() and not results.is_dir():
        raise UsageError(f"{results} is a file; give a new folder")
    if results.is_dir() and any(
        path.name not in ("lock", "ray.log") and not path.name.startswith(".") for path in results.iterdir()
    ):
        raise UsageError(f"{results} is not empty and holds no sweep; give a new folder")


def check_new(results: Path, sweep: Sweep) -> None:
    """UsageError where this sweep could not begin: now, and not when its data were prepared for hours."""
    refuse_if_taken(results, sweep)
    with locked(results):
        pass


def create(results: Path, sweep: Sweep, command: str) -> None:
    """Make the folder this sweep's; called with the lock held."""
    from raysparse.train.versions import versions

    content = {
        "digest": sweep.digest,
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "sweep": sweep.model_dump(mode="json"),
    }
    write_text(results / "sweep.json", json.dumps(content, indent=2) + "\n")


def load(results: Path) -> tuple[Sweep, str]:
    """The sweep of a folder and the command that began it. UsageError where there is none, or it was changed."""
    content = read(results)
    sweep = space.parse(content["sweep"], str(results / "sweep.json"))
    if sweep.digest != content["digest"]:
        raise UsageError(
            f"{results / 'sweep.json'} does not agree with its own digest: it was changed by hand, or made by "
            f"another version of raysparse (it names {content['versions'].get('raysparse')})"
        )
    return sweep, content["command"]


@contextmanager
def locked(results: Path) -> Iterator[None]:
    """The right to drive the sweep in this folder; the system frees it when the process ends, however it ends.

    UsageError where the folder cannot be made or written.
    """
    new = list(itertools.takewhile(lambda folder: not folder.exists(), (results, *results.parents)))
    check_writable(results)
    with (results / "lock").open("a+", errors="replace") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            raise Busy(f"another process drives the sweep in {results}: {stream.read().strip()}") from None
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {platform.node()}\n")
        stream.flush()
        try:
            yield
        finally:
            if not (results / "sweep.json").exists():  # refused before it began: leave nothing behind
                (results / "lock").unlink(missing_ok=True)
                with suppress(OSError):  # up to one that is no longer empty
                    for folder in new:
                        folder.rmdir()


def read(results: Path) -> dict[str, Any]:
    """sweep.json as it is. UsageError where there is none, or it is no sweep's."""
    path = results / "sweep.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{results} is not a sweep's results folder: it has no sweep.json") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: restore the file from a copy ({error})") from error
    if not isinstance(content, dict) or not {"digest", "sweep", "command", "versions"} <= set(content):
        raise UsageError(f"{path} is not a sweep's: it lacks digest, sweep, command or versions")
    return content
