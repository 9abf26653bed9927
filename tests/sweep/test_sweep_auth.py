"""The token of a local Ray."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from raysparse.sweep import auth


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_first_sweep_of_a_machine_makes_a_token_that_only_its_owner_reads(home: Path) -> None:
    auth.make_token()
    (path,) = (home / ".ray").iterdir()
    assert path == auth.token_path()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    token = path.read_text()
    assert len(token) == 64
    auth.make_token()
    assert path.read_text() == token


def test_a_token_of_ones_own_is_left_alone(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "token"))
    auth.make_token()
    assert not list(home.iterdir())


def test_where_no_token_can_be_written_ray_says_so(home: Path) -> None:
    (home / ".ray").touch()
    auth.make_token()
