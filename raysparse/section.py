"""Section: what all settings have in common, those of files and those that plugins declare."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """Frozen; an unknown key, inf, nan, and a boolean where a number belongs are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `steps: yes` as true, which pydantic would take for 1."""
        given = value if isinstance(value, list | tuple) else (value,)
        for part in given:
            if isinstance(part, bool):
                kinds = set(_kinds(cls.model_fields[info.field_name or ""].annotation))
                if kinds & {int, float} and bool not in kinds:
                    words = "yes, on and true" if part else "no, off and false"
                    raise ValueError(f"got {part}, as YAML reads {words}; give a number")
        return value


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of: int and NoneType of `tuple[int, ...] | None`."""
    if not (parts := get_args(annotation)):
        yield annotation
    for part in parts:
        yield from _kinds(part)
