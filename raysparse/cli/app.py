"""What the commands share: the application, options with one meaning everywhere, files and `--set` made to settings."""

from __future__ import annotations

import errno
import io
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

import raysparse
from raysparse import config, plugins, space
from raysparse.config import TrialConfig
from raysparse.errors import UsageError, WorkerDied

app = typer.Typer(
    help="Sparse-to-sparse training of diffusion models, swept on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

# What is a person's to mend as much as a wrong setting is.
UNWRITABLE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
    errno.ENAMETOOLONG, errno.EFBIG,
}  # fmt: skip

Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value, e.g. train.steps=100; repeatable."),
]
SweepChanges = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="e.g. base.train.steps=100; repeatable.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Cpus = Annotated[int | None, typer.Option(min=1, help="CPUs to use on this machine; default all.")]
Address = Annotated[str | None, typer.Option(help="A running Ray cluster; default $RAY_ADDRESS, else a local Ray.")]
Data = Annotated[Path | None, typer.Option("--data", help="The raw data: a file or a folder, instead of a download.")]


def main() -> None:
    """The `raysparse` command: exit code 2 for the user's mistakes, without a traceback."""
    # A terminal that has no Δ shows a ? for it; stderr never fails by itself.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
    try:
        app()
    except UsageError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except WorkerDied as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        place = error.filename2 or error.filename  # of a rename the second: the first is a temporary name
        what = f"{place}: {error.strerror}" if place else str(error)
        typer.echo(f"error: {what}; check permissions and free space", err=True)
        sys.exit(2)


def command_line() -> str:
    """What to type to get the same again."""
    return shlex.join(["raysparse", *sys.argv[1:]])


def parse_changes(changes: list[str] | None) -> dict[str, Any]:
    """`["train.steps=5"]` -> `{"train.steps": 5}`; values are YAML. UsageError for one without `=`."""
    parsed = {}
    for change in changes or []:
        name, equals, text = change.partition("=")
        if not equals or not name:
            raise UsageError(f"--set takes KEY=VALUE such as train.steps=100, got {change!r}")
        try:
            parsed[name] = space.read_yaml(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise UsageError(f"--set {name}: {text!r} is not a YAML value") from error
    return parsed


def load_sweep(path: Path, changes: list[str] | None, data: Path | None) -> space.Sweep:
    """The sweep file with the command line's changes."""
    return space.load(path, sweep_changes(changes, data))


def sweep_changes(changes: list[str] | None, data: Path | None) -> dict[str, Any]:
    """The command line's changes, by dotted paths into a sweep file."""
    return parse_changes(changes) | ({} if data is None else {"base.data.source": str(data)})


def load_trial(path: Path | None, changes: list[str] | None, data: Path | None) -> TrialConfig:
    """A trial from a trial file, from the base of a sweep file, or from the defaults."""
    overrides = parse_changes(changes)
    content: Mapping[str, Any] = space.load_yaml(path) if path else {}
    if path and ("grid" in content or "search" in content):
        method = overrides.get("sparse.method", "dense")
        plugins.load("methods", str(method))
        content = space.base_data(space.load(path), method)
    for name, value in overrides.items():
        content = config.with_value(content, name, value)
    if data is not None:
        content = config.with_value(content, "data.source", str(data))
    return config.parse(content, str(path or "trial"))


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if show:
        typer.echo(raysparse.__version__)
        raise typer.Exit
