"""Plugins are found by their file's name."""

from __future__ import annotations

import pytest

from raysparse import plugins
from raysparse.errors import UsageError


@pytest.mark.parametrize("kind", sorted(plugins.PACKAGES))
def test_every_kind_lists_and_loads_its_files(kind: str) -> None:
    known = plugins.names(kind)
    assert known
    assert not any(name.startswith("_") for name in known)
    for name in known:
        assert plugins.load(kind, name).__name__.endswith(f".{name}")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        plugins.load("methods", "rigI")
    assert "did you mean 'rigl'" in str(caught.value)
    assert "dense" in str(caught.value)
