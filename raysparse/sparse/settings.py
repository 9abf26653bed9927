"""The settings that methods share, by kind of method; torch-free.

A method's file names its own class of them, `Settings`: one of these, or one that adds a field of its own. Each field
is an axis in a sweep file and a key of a trial's `sparse` section. Defaults are the paper's main runs.

The six settings of the first version (config.SparseConfig) are part of every trial's id. All others enter an id where
they differ from their default, so that a setting that is added later leaves the ids of known trials alone: **a default
here never changes**.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from raysparse import plugins
from raysparse.errors import UsageError, unknown, usage_error_from
from raysparse.section import Section
from raysparse.sparse.allocation import ALLOCATIONS
from raysparse.sparse.schedules import SCHEDULES

LARGEST = 2**63 - 1  # of what is in a trial's records


class Dense(Section):
    """No setting at all."""

    def unused(self) -> set[str]:
        """The names of the settings that the others leave without effect."""
        return set()

    def relevant(self) -> Self:
        """These settings with what they leave without effect at its default, so that equal trials have equal ids."""
        return self.model_copy(update={name: type(self).model_fields[name].default for name in self.unused()})

    def bounds(self) -> list[int]:
        """The end of each range of timesteps that has masks of its own; none: the same masks for all."""
        return []


class Sparse(Dense):
    """Of every method that masks."""

    sparsity: float = 0.5  # S, share of maskable weights at zero, [0, 1)
    allocation: str = "erk"  # densities per layer; erk: ER for linear, ERK for conv
    pattern: str = "element"  # a file in sparse/patterns/: what is pruned and grown as one
    block: int = Field(16, ge=4, le=64)  # B, edge of a block; pattern block
    m: int = Field(4, ge=2)  # M of N:M, inputs in a group, of which N = (1 - S) M stay; pattern nm
    # What a convolution with a kernel does under a pattern for matrices (block, diagonal): masked by element, or dense.
    other_layers: Literal["element", "dense"] = "element"

    @field_validator("sparsity")
    @classmethod
    def _share(cls, value: float) -> float:
        if not 0 <= value < 1:
            raise ValueError(f"sparsity is {value}; it is the share of zero weights and must be in [0, 1).")
        return value

    @field_validator("allocation")
    @classmethod
    def _known_allocation(cls, value: str) -> str:
        return _one_of("allocation", value, ALLOCATIONS)

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, value: str) -> str:
        return _one_of("pattern", value, plugins.names("patterns"))

    @model_validator(mode="after")
    def _fits_the_pattern(self) -> Self:
        plugins.load("patterns", self.pattern).check(self)
        return self

    def unused(self) -> set[str]:
        """What the pattern does not use."""
        used: frozenset[str] = plugins.load("patterns", self.pattern).SETTINGS
        return {"block", "m", "other_layers"} - used

    def relevant(self) -> Self:
        """With what the pattern decides, too."""
        return super().relevant().model_copy(update=plugins.load("patterns", self.pattern).FIXED)


class Dynamic(Sparse):
    """Of every method whose topology changes."""

    prune_ratio: float = 0.5  # p, share of a layer's active units replaced per topology update, (0, 1]
    update_interval: int = Field(800, le=LARGEST)  # ΔTe, optimizer steps (800 ChiroDiff, 1100 Latent Diffusion)
    prune_schedule: str = "constant"  # of p over training: a function in sparse/schedules.py
    update_end_fraction: float = Field(1.0, gt=0, le=1)  # no topology update after this share of the steps
    prune_ratio_end: float = Field(0.0, ge=0, le=1)  # where the schedule of p ends
    interval_schedule: str = "constant"  # of ΔTe, as prune_schedule
    update_interval_end: int | None = Field(None, ge=1)  # optimizer steps; where the schedule of ΔTe ends
    stall_reports: int = Field(2, ge=1)  # schedule stall: so many reports in a row without a better FID are a stall
    stall_tolerance: float = Field(0.01, ge=0, lt=1)  # better means lower than the best by more than this share of it

    @field_validator("prune_ratio")
    @classmethod
    def _share_replaced(cls, value: float) -> float:
        if not 0 < value <= 1:
            raise ValueError(f"prune_ratio is {value}; it must be in (0, 1].")
        return value

    @field_validator("update_interval")
    @classmethod
    def _steps(cls, value: int) -> int:
        if value < 1:
            raise ValueError(f"update_interval is {value}; it counts optimizer steps and must be at least 1.")
        return value

    @field_validator("prune_schedule", "interval_schedule")
    @classmethod
    def _known_schedule(cls, value: str, info: Any) -> str:
        return _one_of(info.field_name, value, SCHEDULES)

    @model_validator(mode="after")
    def _an_interval_that_changes_ends_somewhere(self) -> Self:
        if self.interval_schedule in ("cosine", "linear") and self.update_interval_end is None:
            raise ValueError(
                f"interval_schedule {self.interval_schedule!r} goes from update_interval to update_interval_end: give "
                "update_interval_end too, in optimizer steps."
            )
        return self

    def unused(self) -> set[str]:
        """What the pattern and the two schedules do not use."""
        stall = "stall" in (self.prune_schedule, self.interval_schedule)
        found = set() if stall else {"stall_reports", "stall_tolerance"}
        found |= {"prune_ratio_end"} if self.prune_schedule == "constant" else set()
        found |= {"update_interval_end"} if self.interval_schedule == "constant" else set()
        return super().unused() | found


def of_method(method: str) -> type[Dense]:
    """The Settings of a method's file. UsageError where the method is unknown."""
    found: type[Dense] = plugins.load("methods", method).Settings
    return found


def given_settings(method: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Dense:
    """A method's settings: what is given and not None over `defaults` over its own.

    defaults: count for those settings that it has and gives no default of its own.

    UsageError: a setting that the method does not have, or out of range.
    """
    kind = of_method(method)
    values = {name: value for name, value in given.items() if value is not None}
    has = ", ".join(sorted(kind.model_fields))
    for name, value in values.items():
        if name not in kind.model_fields:
            those = f"It has: {has}." if has else "It has no settings."
            raise UsageError(f"method {method!r} has no {name}, which was set to {value!r}. {those}")
    try:
        shared = kind.model_fields.keys() - vars(kind).get("__annotations__", {}).keys()
        return kind(**{name: value for name, value in defaults.items() if name in shared} | values)
    except ValidationError as error:
        raise usage_error_from(error, f"method {method!r}", kind) from None


def _one_of(what: str, value: str, known: Iterable[str]) -> str:
    if value not in (names := sorted(known)):
        raise ValueError(unknown(what, value, names))
    return value
