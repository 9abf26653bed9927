"""What several test folders share."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

# A shell's background job ignores Ctrl-C, and so would all that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before torch is imported: the suite shares few cores with Ray's processes, and one thread makes sums repeatable.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

# An example may take as long as it does: cores are shared with Ray's processes, and none of these tests is of time.
hypothesis.settings.register_profile("raysparse", deadline=None)
hypothesis.settings.load_profile("raysparse")

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the slow tests those first that may take minutes: else two processes end far from each other."""
    items.sort(key=lambda item: not (item.get_closest_marker("slow") and item.get_closest_marker("timeout")))


@pytest.fixture(scope="session")
def kanjivg_path() -> Path:
    """The real KanjiVG sketches where they are at hand: $RAYSPARSE_KANJIVG, or beside the checkout."""
    path = Path(os.environ.get("RAYSPARSE_KANJIVG", ROOT.parent / "shared/data/kanjivg/kanji.rdp100.npz"))
    if not path.is_file():
        pytest.skip("no kanji.rdp100.npz here; set RAYSPARSE_KANJIVG to its path to run this test")
    return path


@pytest.fixture(scope="session")
def compiler() -> None:
    """For tests of compiled kernels: they lie in the user's cache, where all runs share them (3 s the first time)."""
    from raysparse import native
    from raysparse.errors import UsageError

    try:
        native._compiler()
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def ray_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray of one's own: own sockets in a short folder (107 bytes are allowed), own token, never one that runs."""
    from ray._private.services import ConsolePopen

    def reaped(process: subprocess.Popen[bytes]) -> None:
        """Ray waits a second for what it has killed, which is too short on busy cores: one CI run warned of it."""
        if getattr(process, "pid", None) and process.returncode is None:
            process.wait(timeout=30)

    ConsolePopen.__del__ = reaped
    home = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))
    token = home / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    root = str(ROOT)  # `raysparse` for a driver that is started as a script
    changes = {
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": str(home),  # where no temp_dir is given
        "RAYSPARSE_DATA": str(tmp_path_factory.mktemp("data")),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    before = {name: os.environ.get(name) for name in [*changes, "RAY_ADDRESS"]}
    os.environ.update(changes)
    os.environ.pop("RAY_ADDRESS", None)
    yield home
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    shutil.rmtree(home, ignore_errors=True)
