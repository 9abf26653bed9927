"""What makes two FIDs comparable, and a FID that refuses to be compared with one of another protocol."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable

from raysparse.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a FID (and the KID beside it) was measured. Equal protocols, equal text, comparable values.

    The sampling seed is left out on purpose: values under different seeds are comparable, that is what a spread is.
    """

    extractor: str  # name of the extractor's file
    weights_hash: str  # the extractor's: of its weights, or of the recipe that makes them
    layer: str  # which features, e.g. "2048"
    generated: int  # samples
    reference_examples: int
    reference_hash: str  # of the reference images' content
    resize: str  # from drawn or stored pixels to the extractor's input, e.g. "bilinear 299"
    ddim_steps: int
    eta: float  # of DDIM: 0 is deterministic
    ema: bool  # sampled from the averaged weights
    guidance: float | None = None  # classifier-free guidance scale
    timestep_spacing: str = "leading"  # which timesteps DDIM visits
    kid_subsets: int | None = None
    kid_subset_size: int | None = None

    def json(self) -> str:
        """Canonical text: sorted keys, no spaces; equal text if and only if equal protocol."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Protocol:
        """The protocol of a record. UsageError where the text is not one."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise UsageError(f"not a FID's protocol: {text[:200]!r} ({error})") from error


def same_protocol(protocols: Iterable[Protocol]) -> Protocol:
    """The one protocol of all of them. UsageError naming the fields that differ, or where there is none."""
    found = list(dict.fromkeys(protocols))
    if not found:
        raise UsageError("got no FID to compare; give at least one")
    first = dataclasses.asdict(found[0])
    for other in found[1:]:
        pairs = [(name, first[name], value) for name, value in dataclasses.asdict(other).items()]
        differing = "; ".join(f"{name} {mine!r} against {theirs!r}" for name, mine, theirs in pairs if mine != theirs)
        raise UsageError(f"FIDs of different protocols are not comparable: {differing}; evaluate both the same way")
    return found[0]


@functools.total_ordering
@dataclasses.dataclass(frozen=True)
class Score:
    """A FID with its protocol. Ordering and difference raise UsageError where the protocols differ."""

    value: float
    protocol: Protocol

    def __lt__(self, other: Score) -> bool:
        same_protocol([self.protocol, other.protocol])
        return self.value < other.value

    def __sub__(self, other: Score) -> float:
        same_protocol([self.protocol, other.protocol])
        return self.value - other.value

    def __str__(self) -> str:
        return f"FID ({self.protocol.extractor}) {self.value:.4g}"
