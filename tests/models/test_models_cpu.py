"""Which CPU this is, where the system does not tell it."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest

from raysparse.models import _cpu


def test_without_proc_python_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6, GenuineIntel")
    assert "GenuineIntel" in _cpu._vendor()
