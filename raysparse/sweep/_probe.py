"""What `raysparse doctor` asks of one machine. It runs on every node of a cluster, whether raysparse is installed or
not: so it is sent by value and imports the standard library only.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import socket
import stat
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "torch", "optuna", "pyarrow", "diffusers", "raysparse")
VISIBLE_WITHIN_S = 10.0  # so long a shared file system may take to show what another machine wrote
_LISTEN = "0A"  # of the states in /proc/net/tcp


def facts(storage: str | None, ports: dict[str, int], dashboard: str | None) -> dict[str, Any]:
    """Plain data of this machine.

    storage: a folder whose disk counts as well. ports: which to look up among the listening ones, by what they are for.
    dashboard: its address, to be asked without a token; None: do not ask.
    """
    disks = {"temporary": os.environ.get("RAY_TMPDIR", "/tmp")} | ({"results": storage} if storage else {})
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "gpus": _gpus(),
        "compiler": _compiler(),
        "token": _token(),
        "listening": _listening(ports),
        "without_token": _status_without_token(dashboard) if dashboard else None,
        "disks": {name: _disk(path) for name, path in disks.items()},
    }


def clock() -> float:
    """Seconds since 1970 as this machine has it."""
    return time.time()


def write(folder: str, name: str, content: str) -> str | None:
    """Write a small file as results are written: under another name, synced, renamed. What went wrong, or None."""
    path = Path(folder) / name
    if not Path(folder).is_dir():  # not made: where a mount is missing, that would hide it
        return "no such folder"
    try:
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        with part.open("w") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None


def unseen(folder: str, expected: dict[str, str]) -> list[str]:
    """Names of the files that are not here with this content, after they had time to appear."""
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while True:
        missing = []
        for name, content in expected.items():
            try:
                seen = (Path(folder) / name).read_text() == content
            except OSError:
                seen = False
            if not seen:
                missing.append(name)
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.25)


def remove(folder: str, directory: str) -> None:
    """Remove the test files of this machine's view of the storage."""
    shutil.rmtree(Path(folder) / directory, ignore_errors=True)


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    if package == "raysparse":  # in a job it comes with the working directory
        with contextlib.suppress(ImportError):
            return str(importlib.import_module(package).__version__)
    return None


def _gpus() -> list[dict[str, Any]]:
    """Name, driver and memory of every GPU that the driver shows; empty without a driver."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines() if line.strip()]
    return [{"name": name, "driver": driver, "memory_mib": memory} for name, driver, memory in rows]


def _compiler() -> str | None:
    """Where the C++ compiler is that raysparse/native.py makes kernels with; None: there is none."""
    try:
        named = [words[0] for words in [shlex.split(os.environ.get("CXX", ""))] if words] or ["c++", "g++", "clang++"]
    except ValueError:  # CXX is no command
        return None
    return next(filter(None, map(shutil.which, named)), None)


def _token() -> dict[str, Any]:
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        rights: int | None = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        rights = None
    return {
        "mode": os.environ.get("RAY_AUTH_MODE"),
        "path": str(path),
        "rights": rights,  # None: no such file
        "in_environment": bool(os.environ.get("RAY_AUTH_TOKEN")),
    }


def _listening(ports: dict[str, int]) -> dict[str, list[str]] | None:
    """Addresses that each of the ports listens on here; None where the system does not say."""
    tables = []
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            tables.append(Path(f"/proc/net/{table}").read_text())
    if not tables:
        return None
    found = [pair for table in tables for pair in listeners(table)]
    return {name: sorted({address for address, port in found if port == wanted}) for name, wanted in ports.items()}


def listeners(table: str) -> list[tuple[str, int]]:
    """Address and port of each listening socket in the text of /proc/net/tcp or tcp6."""
    found = []
    for line in table.splitlines()[1:]:
        columns = line.split()
        if len(columns) > 3 and columns[3] == _LISTEN:
            address, _, port = columns[1].partition(":")
            found.append((_address(address), int(port, 16)))
    return found


def _address(digits: str) -> str:
    """`0100007F` -> 127.0.0.1: words of 32 bits in the machine's order, which is little-endian here."""
    raw = b"".join(bytes.fromhex(digits[at : at + 8])[::-1] for at in range(0, len(digits), 8))
    if len(raw) == 16 and raw[:12] == bytes(10) + b"\xff\xff":  # an IPv4 address in IPv6
        raw = raw[12:]
    return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)


def _status_without_token(dashboard: str) -> int | None:
    """HTTP status of the Jobs API asked without a token; None: no answer."""
    request = urllib.request.Request(f"{dashboard.rstrip('/')}/api/jobs/")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return int(error.code)
    except OSError:
        return None


def _disk(path: str) -> dict[str, Any]:
    """Bytes free where `path` is or would be."""
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return {"path": path, "free_bytes": shutil.disk_usage(place).free}
    except OSError as error:
        return {"path": path, "free_bytes": None, "error": str(error)}
