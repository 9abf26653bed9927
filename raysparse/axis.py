"""One axis of a sweep file: a list of values or a range of numbers, what may be drawn from it, and what may be one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Self, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from raysparse import config
from raysparse.errors import UsageError, unknown, usage_error_from
from raysparse.section import Section
from raysparse.sparse.settings import of_method

# Of `evaluate`, what a FID's protocol is made of (metrics/protocol.py).
PROTOCOL = (
    "extractor",
    "generated",
    "references",
    "ddim_steps",
    "eta",
    "timestep_spacing",
    "guidance",
    "kid_subsets",
    "kid_subset_size",
)
SAME_REFERENCE = ("representation", "flips")  # options of data sets that leave the reference images what they are
NOT_AN_AXIS = ("seed", "sparse.method", "train.steps")  # replicates, the outer axis, the budget


class Range(Section):
    """Numbers from low to high, both included; `step` for multiples, `log` for even draws in the exponent."""

    low: float
    high: float
    step: float | None = Field(None, gt=0)
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low > 0 and no step")
        return self

    @property
    def whole(self) -> bool:
        """Whether it is written in whole numbers."""
        return all(float(v).is_integer() for v in (self.low, self.high, self.step or 1))

    def drawn(self, most: int, integer: bool) -> tuple[float, ...]:
        """What may be drawn, rising: the first `most` and the last; without steps both ends and the middle."""
        step = self.step or (1 if integer else None)
        if step is None:
            return (self.low, (self.low + self.high) / 2, self.high)
        count = math.floor((self.high - self.low) / step + 1e-9)
        values = [min(self.low + number * step, self.high) for number in (*range(min(most, count)), count)]
        return tuple(int(value) if integer else float(value) for value in values)


def _axis(given: Any) -> Any:
    """A mapping is a range, a list its values. Left to itself, pydantic tries both and complains of both."""
    if isinstance(given, Range | list | tuple):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(f"an axis is a list of values such as [0.5, 0.9], or {{low: 0.1, high: 0.9}}, got {given!r}")
    try:
        return Range.model_validate(given)
    except ValidationError as error:
        raise ValueError(str(usage_error_from(error, "", Range)).replace("\n: ", "; ").removeprefix(": ")) from None


Axis = Annotated[Range | tuple[Any, ...], BeforeValidator(_axis)]


def _known_methods(given: Any) -> Any:
    """A method that there is not is told before its axes are: `axes:` in a grid, as a search has it, is no range.

    `dense:` with nothing behind it, which YAML reads as null, is `dense: {}`.
    """
    if not isinstance(given, Mapping):
        return given
    for method in given:
        if isinstance(method, str):
            config.method_settings(method)
    return {method: {} if axes is None else axes for method, axes in given.items()}


# method -> axis -> values
Axes = Annotated[dict[str, dict[str, Axis]], BeforeValidator(_known_methods)]


def check_axis(method: str, name: str, axis: Axis) -> None:
    """ValueError where a method has no such axis, where trials along it would not compare, or where it is empty."""
    settings, known = config.method_settings(method), config.all_settings()
    if name in known and name not in settings:
        raise ValueError(f"method {method!r} has no axis {name!r}; it has {', '.join(sorted(settings)) or 'none'}")
    if "." not in name and name not in known:
        raise ValueError(f"{method}: " + unknown("axis", name, settings) + "; or a dotted path such as optimizer.lr")
    if name.startswith("evaluate.intermediate"):
        raise ValueError(f"{name} is not an axis: trials are compared by the intermediate FID, so all have the same")
    if "." in name:
        _check_path(name)
        _check_comparable(name)
    if name in NOT_AN_AXIS:
        raise ValueError(f"{name} is not an axis: seeds are replicates (confirm.seeds), train.steps is the budget")
    if tuple(name.split(".")) in config.PLACES:
        raise ValueError(
            f"{name} is not an axis: it says where or how fast a trial runs, not what it is; set it for all in the "
            "base trial"
        )
    if isinstance(axis, tuple) and not axis:
        raise ValueError(f"{method}.{name} has no values")
    if isinstance(axis, Range) and is_integer(method, name, axis) and not axis.whole:
        raise ValueError(f"{method}.{name} takes whole numbers: low, high and step must be such, got {axis}")


def choices(method: str, name: str, axis: Axis, most: int) -> tuple[Any, ...]:
    """Every choice of a list; of a range what may be drawn, as `Range.drawn`."""
    return axis.drawn(most, is_integer(method, name, axis)) if isinstance(axis, Range) else axis


def ends(method: str, name: str, axis: Axis) -> tuple[Any, ...]:
    """Every choice of a list, both ends of a range."""
    found = choices(method, name, axis, 1)
    return (found[0], found[-1]) if isinstance(axis, Range) else found


def is_integer(method: str, name: str, axis: Range) -> bool:
    """Whether a range's numbers are whole: where the setting's are, however the ends are written.

    An option is declared by its model or data set, which may need torch: there it is as the ends are written.
    """
    field = of_method(method).model_fields.get(name.removeprefix("sparse.")) or config.field_at(name)
    if field is None:
        return axis.whole and axis.high > 1
    kinds = get_args(field.annotation) or (field.annotation,)  # of `int | None` both
    return int in kinds


def _check_path(name: str) -> None:
    try:
        config.field_at(name)
    except UsageError as error:
        raise ValueError(str(error)) from error


def _check_comparable(name: str) -> None:
    """ValueError where trials that differ in this setting have FIDs that do not compare."""
    section, _, rest = name.partition(".")
    option = rest.removeprefix("options").removeprefix(".")
    other_reference = rest == "name" or (rest.startswith("options") and option not in SAME_REFERENCE)
    if (section == "evaluate" and rest in PROTOCOL) or (section == "data" and other_reference):
        raise ValueError(
            f"{name} is not an axis: FIDs of different protocols, or against other reference images, do not compare; "
            "set it for all in the base trial, or evaluate trained models again: raysparse evaluate"
        )
    if name == "evaluate.every_steps":
        raise ValueError(
            f"{name} is not an axis: trials are compared at the same steps; set it for all in the base trial"
        )
