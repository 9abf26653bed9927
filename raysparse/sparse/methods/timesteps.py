"""Static-DM with a mask per range of denoising timesteps: several sparsities over one set of weights.

Sparser ranges use a part of what denser ones do (masks are nested), so that as many weights are kept as the densest
range has. The paper names masks by timestep as future work and gives no form of them.
"""

from __future__ import annotations

import re
from typing import Any, Self

from pydantic import field_validator, model_validator

from raysparse import plugins
from raysparse.sparse.method import Method
from raysparse.sparse.settings import Sparse

FORM = re.compile(r"(\d+)-(\d+):(0|0?\.\d+)")


class Settings(Sparse):
    # first-end:sparsity, the end left out, in their order; together they cover every timestep
    ranges: str = "0-500:0.5,500-1000:0.75"
    sparsity: float = 0.5  # follows from the ranges: the densest one's, as the weights of all masks together have it

    @field_validator("ranges")
    @classmethod
    def _meet(cls, value: str) -> str:
        at = 0
        for first, end, _ in parsed(value):
            if first != at:
                what = "overlap" if first < at else "leave out timesteps"
                raise ValueError(f"ranges {value!r} {what} at {min(first, at)}: each begins where the one before ends")
            if end <= first:
                raise ValueError(f"ranges {value!r}: {first}-{end} is empty")
            at = end
        return value

    @model_validator(mode="before")
    @classmethod
    def _densest(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        ranges = data.get("ranges", cls.model_fields["ranges"].default)
        try:
            least = min(sparsity for _, _, sparsity in parsed(ranges))
        except (ValueError, TypeError, AttributeError):  # the last: no text
            return data  # `ranges` complains itself
        if data.get("sparsity") not in (None, least):
            raise ValueError(f"sparsity is {data['sparsity']}, but the densest of the ranges has {least}; leave it out")
        return {**data, "sparsity": least}

    @model_validator(mode="after")
    def _each_fits_the_pattern(self) -> Self:
        for own in self.each():
            plugins.load("patterns", self.pattern).check(own)
        return self

    def each(self) -> list[Self]:
        """The settings of every range by itself."""
        return [self.model_copy(update={"sparsity": sparsity}) for _, _, sparsity in parsed(self.ranges)]

    def bounds(self) -> list[int]:
        """The end of every range."""
        return [end for _, end, _ in parsed(self.ranges)]


def parsed(ranges: str) -> list[tuple[int, int, float]]:
    """(first, end, sparsity) of each range. ValueError where the text is none."""
    found = [FORM.fullmatch(part.strip()) for part in ranges.split(",")]
    if not all(found):
        raise ValueError(f"ranges is {ranges!r}; give first-end:sparsity, ..., such as 0-500:0.5,500-1000:0.75")
    return [(int(match[1]), int(match[2]), float(match[3])) for match in found if match]


METHOD = Method(by_timestep=True)
