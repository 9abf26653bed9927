"""Which CPU this is, where the system tells it and where it does not."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest

from raysparse.models import _cpu


@pytest.mark.parametrize("text", ["vendor_id\t: GenuineIntel\n", "vendor_id\t: AuthenticAMD\n"])
def test_the_maker_is_what_the_system_says(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert _cpu._vendor() == text


def test_without_proc_python_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6, GenuineIntel")
    assert "GenuineIntel" in _cpu._vendor()
