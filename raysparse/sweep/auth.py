"""Ray's token: where it lies, who else can read it, and using it.

Whoever holds the token of a cluster can run any program on it: the Jobs API is remote code execution by design. So it
stays in a file that only its owner reads (0600), goes to the machines by `file_mounts`, and travels through the SSH
tunnel that `ray dashboard` opens, never in the clear.
"""

from __future__ import annotations

import os
import secrets
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from raysparse.errors import UsageError

MAKE = "`ray get-auth-token --generate` makes one at ~/.ray/auth_token"


def token_path(given: Path | None = None) -> Path:
    """The token's file: the given one, else $RAY_AUTH_TOKEN_PATH, else Ray's own place. It may not exist."""
    path = given or os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    return Path(path).expanduser()


def wide_rights(path: Path) -> str | None:
    """`0644` where others than the owner have any right on the file, None where they have none."""
    mode = stat.S_IMODE(path.stat().st_mode)
    return f"{mode:04o}" if mode & 0o077 else None


def use_token(given: Path | None = None) -> Path | None:
    """Have Ray in this process, and in those it starts, authenticate with the token of the file.

    None: without `given`, $RAY_AUTH_TOKEN holds the token itself; it is left there.
    UsageError where the file is missing or empty, or others can read it; then nothing was sent anywhere.
    """
    if given is None and os.environ.get("RAY_AUTH_TOKEN"):
        _renew("token")
        return None
    path = token_path(given)
    if not path.is_file():
        raise UsageError(f"no token at {path}: {MAKE}; every machine of the cluster needs the same one")
    if wide := wide_rights(path):
        raise UsageError(
            f"{path} has rights {wide}, but whoever reads it can run any program on the cluster: only its owner may "
            f"have rights on it; do: chmod 600 {path}, and make a new token if others use this machine"
        )
    if not path.read_text(encoding="utf-8", errors="replace").strip():
        raise UsageError(f"the token file {path} is empty: {MAKE}")
    os.environ.pop("RAY_AUTH_TOKEN", None)  # it would win over the file
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    _renew("token")
    return path


def make_token() -> None:
    """A token where a local Ray looks for one, if there is none: Ray's own would have rights 0644."""
    if any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    path = token_path()
    with suppress(OSError):  # one is there, or nothing can be: Ray says what is wrong
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".auth_token.")  # 0600
        try:
            with os.fdopen(handle, "w") as stream:
                stream.write(secrets.token_hex(32))
            os.link(name, path)  # whole, and never in another's place
        finally:
            os.unlink(name)


def _renew(mode: str) -> None:
    """Set the mode, also for a Ray that was imported before and keeps what it read then."""
    os.environ["RAY_AUTH_MODE"] = mode
    raylet: Any = sys.modules.get("ray._raylet")
    if raylet is not None:
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
