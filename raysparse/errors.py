"""The one error that is the user's to mend, and how pydantic's complaints become one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


class UsageError(Exception):
    """Bad input: says what was got, what the rule is and what to do.

    The command line prints it without a traceback and exits with 2.
    """


class RanksApart(UsageError):
    """The ranks of a trial found different checkpoints, as on storage that shows a node what was there before: a sweep
    starts it again.
    """


class OtherCheckpoint(UsageError):
    """A whole one of another trial, other data or another version of raysparse: it is not damaged, and stays."""


class WorkerDied(RuntimeError):
    """A rank's process was ended from outside, as by the system for want of memory.

    The command line prints it without a traceback, which would be of who waited, and exits with 1.
    """


def unknown(what: str, got: object, known: Iterable[str]) -> str:
    """`unknown key 'sparcity' (did you mean 'sparsity'?); known: ...`; YAML has keys that are no text, such as 1."""
    names = sorted(known)
    close = difflib.get_close_matches(str(got), names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown {what} {got!r}{hint}; known: {', '.join(names)}"


def usage_error_from(error: ValidationError, where: str, model: type[BaseModel]) -> UsageError:
    """One line per complaint: the place in the file, what was got and the rule; an unknown key with the nearest one.

    where: the file or section that was read; model: the class that refused it, walked to find the known keys.
    """
    lines = []
    for complaint in error.errors():
        path = [str(part) for part in complaint["loc"]]
        if complaint["type"] == "extra_forbidden":
            section = _section(model, path[:-1])
            message = unknown("key", path[-1], section.model_fields if section else [])
        elif complaint["type"] == "missing":
            message = "is missing"
        elif complaint["type"] == "value_error":
            message = complaint["msg"].removeprefix("Value error, ")
        else:
            message = f"got {complaint['input']!r}: {complaint['msg'][0].lower()}{complaint['msg'][1:]}"
        lines.append(f"{where}: {'.'.join(path) + ': ' if path else ''}{message}")
    return UsageError("\n".join(lines))


def _section(model: Any, path: list[str]) -> Any:
    for name in path:
        field = getattr(model, "model_fields", {}).get(name)
        if field is None:
            return None
        choices = get_args(field.annotation) or (field.annotation,)  # `Search | None`
        model = next((choice for choice in choices if hasattr(choice, "model_fields")), None)
    return model
