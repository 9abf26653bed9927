"""Find a method, pattern, model, dataset or extractor by name: the file's name is the public name.

A new one is a new file in its folder; there is no list to edit.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pkgutil
import sys
from types import ModuleType
from typing import Any

from raysparse.errors import UsageError, unknown

PACKAGES = {
    "methods": "raysparse.sparse.methods",
    "patterns": "raysparse.sparse.patterns",
    "models": "raysparse.models",
    "datasets": "raysparse.data.datasets",
    "extractors": "raysparse.metrics.extractors",
}


def names(kind: str) -> list[str]:
    """The public names of one kind, sorted; files that start with an underscore are helpers, not plugins."""
    paths = tuple(importlib.import_module(PACKAGES[kind]).__path__)
    return list(_names(paths, tuple(os.stat(path).st_mtime_ns for path in paths)))


@functools.cache  # until a file comes or goes: a sweep of 10,000 trials would list the methods 40,000 times
def _names(paths: tuple[str, ...], changed_ns: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(sorted(module.name for module in pkgutil.iter_modules(paths) if not module.name.startswith("_")))


@functools.cache  # a trial's settings ask for its method several times, and listing a folder takes longer than the rest
def load(kind: str, name: str) -> ModuleType:
    """The module of one plugin. UsageError where there is none, with the known names."""
    known = names(kind)
    if name not in known:
        raise UsageError(unknown(kind[:-1], name, known))
    return importlib.import_module(f"{PACKAGES[kind]}.{name}")


def functions(module: str) -> dict[str, Any]:
    """The public functions that a module has defined so far, by name: where a plugin is a function, not a file."""
    found = inspect.getmembers(sys.modules[module], inspect.isfunction)
    return {name: value for name, value in found if value.__module__ == module and not name.startswith("_")}
