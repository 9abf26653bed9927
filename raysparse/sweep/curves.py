"""Learning curves for the simulator: recorded ones, or ones made up from the papers' published results.

`analysis/published/sparse_to_sparse.csv` holds Tables 1-10 of "Sparse-to-Sparse Training of Diffusion Models" (TMLR
2025), as printed.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from raysparse import results as records
from raysparse import rng
from raysparse.errors import UsageError, unknown

Curve = tuple[tuple[int, float], ...]  # (step, FID) at each evaluation, the last step included
Config = dict[str, Any]  # a whole TrialConfig as plain data, as `board.Row` has it


class Curves(Protocol):
    """What the simulator asks: the FIDs that a trial would report, in one of many possible worlds."""

    @property
    def source(self) -> str:
        """Which curves these are, in words."""

    def curve(self, trial_id: str, config: Config, world: int) -> Curve:
        """The same arguments give the same curve: a trial that is resumed, or met twice, is the same trial."""


def evaluations(config: Config) -> list[int]:
    """The steps at which a trial reports: each multiple of `evaluate.every_steps`, and the last."""
    total, every = config["train"]["steps"], config["evaluate"]["every_steps"]
    return [*range(every, total, every), total]


class Anchor(NamedTuple):
    """A published result: mean FID over seeds at a sparsity, and its standard deviation where it is printed."""

    sparsity: float
    fid: float
    std: float | None


@dataclasses.dataclass(frozen=True)
class Descent:
    """How FID falls towards its final value F, the part that the papers' tables do not have.

        FID(u) = F (1 + (start - 1) (exp(-k u) - exp(-k)) / (1 - exp(-k))) (1 + noise z),  u = step / total

    k is drawn per trial, log-normal: trials fall at different rates, so curves cross, and early ones mislead. The
    defaults are an assumption for the papers' long budgets, not a measurement: FID at a tenth of them about twice F.
    SHORT is a reading by eye of two trials of quickstart.yaml at 480 steps, one seed: dense (k 4.9, start 2.6) and
    static at S = .5 (k 4.7). All spreads and `noise` are assumptions.
    """

    start: float = 12.0  # FID at step 0 over F
    rate: float = 25.0  # median of k
    rate_spread: float = 0.15  # standard deviation of log k between trials
    slower_with_sparsity: float = 0.1  # k is multiplied by 1 - this x S
    noise: float = 0.02  # of one evaluation, relative; none at the last, whose noise is in the published spread


LONG, SHORT = Descent(), Descent(start=2.6, rate=5.0)
SHORT_STEPS = 5_000  # budgets below this descend like SHORT
RISE_PER_OCTAVE = 0.01  # an assumption: FID rises by so much per doubling or halving of the number of updates
PUBLISHED_STEPS = {  # budget and ΔTe of the papers' runs: the tables hold for this number of topology updates only
    "quickdraw": (661_200, 800),
    "kanjivg": (40_800, 800),
    "vmnist": (39_600, 800),
    "celeba_hq": (156_300, 1100),
    "lsun_bedrooms": (132_600, 1100),
    "imagenette": (118_500, 1100),
}
HIGH_P, LOW_P = 0.5, 0.05  # the two prune ratios that the tables have


class Published:
    """Curves whose final FID is interpolated from the tables of one data set.

    Mean: linear in S through dense (S = 0), the method's best S (Tables 1, 2; the best p = .05 of Table 3) and S = .9
    (Tables 9, 10), and on at the last slope beyond; linear in log p between .05 and .5, constant outside. No S between
    is better than the published best of the method: that is how the tables chose it. The spread over seeds is
    interpolated alike and drawn per trial and world. Other axes (optimizer.lr, ...) have no effect of their own.
    """

    def __init__(self, dataset: str, descent: Descent | None = None, stands_for: str | None = None) -> None:
        """stands_for: the data set that is meant, where the papers have no results on it."""
        if dataset not in PUBLISHED_STEPS:
            raise UsageError(unknown("published data set", dataset, PUBLISHED_STEPS))
        self.dataset, self._stands_for = dataset, stands_for
        self.descent = descent or LONG
        self._anchors = _anchors(dataset)

    @classmethod
    def nearest(cls, config: Config, descent: Descent | None = None) -> Published:
        """The trial's own data set, or of those that the papers have, one of its kind."""
        descent = descent or (SHORT if config["train"]["steps"] < SHORT_STEPS else LONG)
        name = config["data"]["name"]
        if name in PUBLISHED_STEPS:
            return cls(name, descent)
        return cls("kanjivg" if config["model"]["name"] == "chirodiff" else "celeba_hq", descent, stands_for=name)

    @property
    def source(self) -> str:
        instead = f", standing in for {self._stands_for}" if self._stands_for else ""
        return f"synthetic, from the published results on {self.dataset}{instead}"

    def final(self, config: Config) -> tuple[float, float]:
        """Mean and standard deviation over seeds of the FID at the last step."""
        sparse = config["sparse"]
        if sparse["method"] == "dense" or not sparse.get("sparsity"):
            anchor = self._anchors["dense"][HIGH_P][0]
            return anchor.fid, anchor.std or 0.0
        # A method that the tables do not have is taken as the middle one of theirs.
        by_p = self._anchors.get(sparse["method"], self._anchors["magran"])
        mean, std = _at(by_p[HIGH_P], sparse["sparsity"])
        if LOW_P in by_p and sparse.get("prune_ratio"):
            share = (math.log(sparse["prune_ratio"]) - math.log(LOW_P)) / (math.log(HIGH_P) - math.log(LOW_P))
            share = min(max(share, 0.0), 1.0)
            low_mean, low_std = _at(by_p[LOW_P], sparse["sparsity"])
            mean, std = share * mean + (1 - share) * low_mean, share * std + (1 - share) * low_std
        if sparse.get("update_interval"):
            steps, interval = PUBLISHED_STEPS[self.dataset]
            octaves = math.log2(config["train"]["steps"] / sparse["update_interval"] / (steps / interval))
            mean *= 1 + RISE_PER_OCTAVE * abs(octaves)
        return mean, std

    def curve(self, trial_id: str, config: Config, world: int) -> Curve:
        draw = rng.numpy_generator(world, f"curve {trial_id}")
        mean, std = self.final(config)
        final = max(mean + std * draw.standard_normal(), mean / 2)
        descent = self.descent
        rate = descent.rate * math.exp(descent.rate_spread * draw.standard_normal())
        rate *= 1 - descent.slower_with_sparsity * (config["sparse"].get("sparsity") or 0.0)
        steps = np.array(evaluations(config))
        left = (np.exp(-rate * steps / steps[-1]) - math.exp(-rate)) / (1 - math.exp(-rate))
        noise = 1 + descent.noise * draw.standard_normal(len(steps)).clip(-3, 3)
        noise[-1] = 1.0
        fids = final * (1 + (descent.start - 1) * left) * noise
        return tuple(zip(steps.tolist(), fids.tolist(), strict=True))


class Recorded:
    """Curves from the records of sweeps that were run: RESULTS/records/*.parquet.

    A trial that was not recorded takes the curve of the nearest one of its method (of any, where the method is new), by
    S, log p and log ΔTe over budget; budgets are aligned as shares. A trial that was stopped goes on as the completed
    ones did from there. Of a configuration with several recorded seeds, the world picks one.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        """UsageError where there is no completed trial."""
        self._folders = [str(folder) for folder in folders]
        found = [known for folder in folders for path in records.record_paths(folder) if (known := _known(path))]
        protocols = {known.protocol for known in found}
        if len(protocols) > 1:
            raise UsageError(
                f"{', '.join(self._folders)} hold FIDs under {len(protocols)} protocols, which cannot be compared; "
                "give folders of one protocol"
            )
        completed = [known for known in found if known.completed]
        if not completed:
            raise UsageError(f"{', '.join(self._folders)} hold no completed trial to learn from")
        self._completed = len(completed)
        self._known = [known if known.completed else _extended(known, completed) for known in found]

    @property
    def source(self) -> str:
        stopped = len(self._known) - self._completed
        extended = f", {stopped} of them stopped and extended" if stopped else ""
        return f"recorded: {len(self._known)} trials of {', '.join(self._folders)}{extended}"

    def curve(self, trial_id: str, config: Config, world: int) -> Curve:
        place = _place(config)
        of_method = [known for known in self._known if known.place[0] == place[0]] or self._known
        nearest = min(_distance(known.place, place) for known in of_method)
        same = [known for known in of_method if _distance(known.place, place) == nearest]
        chosen = same[rng.key(world, f"recorded {trial_id}") % len(same)]
        steps = evaluations(config)
        shares, fids = zip(*chosen.curve, strict=True)
        values = np.interp(np.array(steps) / steps[-1], shares, fids)
        return tuple(zip(steps, values.tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class _Known:
    """A recorded trial: (share of the budget, FID) at each report."""

    place: tuple[str, tuple[float, ...]]
    curve: tuple[tuple[float, float], ...]
    completed: bool
    protocol: str


def _known(path: Path) -> _Known | None:
    """None of a trial without a usable FID."""
    names = ["step", "diverged", "state", "total_steps", "config", "protocol", "intermediate_protocol"]
    rows = records.read_trial(path).select([*names, "fid", "intermediate_fid"]).to_pylist()
    early = rows[0]["intermediate_protocol"] is not None  # one protocol from the first report to the last
    fid = "intermediate_fid" if early else "fid"
    rows = [row for row in rows if row[fid] and not row["diverged"]]
    if not rows or rows[0]["state"] == "FAILED":
        return None
    by_step = {row["step"]: row[fid] for row in rows}
    total = rows[0]["total_steps"]
    curve = tuple((step / total, by_step[step]) for step in sorted(by_step))
    protocol = rows[0]["intermediate_protocol" if early else "protocol"]
    return _Known(_place(json.loads(rows[0]["config"])), curve, max(by_step) >= total, protocol)


def _extended(known: _Known, completed: Sequence[_Known]) -> _Known:
    """A stopped trial's curve to the end: it falls by as much, relatively, as the median completed one from there."""
    share, fid = known.curve[-1]
    later = sorted({at for one in completed for at, _ in one.curve if at > share})
    ratios = []
    for one in completed:
        shares, fids = zip(*one.curve, strict=True)
        ratios.append(np.interp(later, shares, fids) / np.interp(share, shares, fids))
    tail = zip(later, (fid * np.median(ratios, axis=0)).tolist(), strict=True)
    return dataclasses.replace(known, curve=(*known.curve, *tail))


def _place(config: Config) -> tuple[str, tuple[float, ...]]:
    """A trial's method, and where it lies among its settings, on scales where 1 is far."""
    sparse = config["sparse"]
    interval = sparse.get("update_interval")
    updates = math.log10(interval / config["train"]["steps"]) if interval else 0.0
    return sparse["method"], (sparse.get("sparsity") or 0.0, math.log10(sparse.get("prune_ratio") or 1.0), updates)


def _distance(one: tuple[str, tuple[float, ...]], other: tuple[str, tuple[float, ...]]) -> float:
    return round(math.dist(one[1], other[1]), 9)


@functools.cache
def _anchors(dataset: str) -> dict[str, dict[float, list[Anchor]]]:
    """method -> prune ratio -> anchors by S."""
    with _published().open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["dataset"] == dataset]
    main = [row for row in rows if row["source"] in ("table 1", "table 2")]
    best = next(row for row in rows if row["source"] == "table 3")
    sparsest = [row for row in rows if row["source"] in ("table 9", "table 10")]
    dense = _anchor(next(row for row in main if row["method"] == "dense"))
    found: dict[str, dict[float, list[Anchor]]] = {"dense": {HIGH_P: [dense]}}
    for method in ("static", "rigl", "magran"):
        own = _anchor(next(row for row in main if row["method"] == method))
        at_low = best["method"] == method and float(best["prune_ratio"] or 0) == LOW_P
        middle = {HIGH_P: own, LOW_P: _anchor(best) if at_low else own}
        found[method] = {}
        for row in (row for row in sparsest if row["method"] == method):
            p = float(row["prune_ratio"] or HIGH_P)
            last = _anchor(row)
            found[method][p] = [dense, *([middle[p]] if middle[p].sparsity < last.sparsity else []), last]
    return found


def _published() -> Path:
    """The papers' numbers, which ship with the analysis; found without importing it (it brings pandas)."""
    spec = importlib.util.find_spec("analysis")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "published" / "sparse_to_sparse.csv"


def _anchor(row: dict[str, str]) -> Anchor:
    return Anchor(float(row["sparsity"]), float(row["fid"]), float(row["fid_std"]) if row["fid_std"] else None)


def _at(anchors: Sequence[Anchor], sparsity: float) -> tuple[float, float]:
    """Mean and standard deviation at a sparsity."""
    first, last = anchors[-2:]
    places = [anchor.sparsity for anchor in anchors]
    mean = float(np.interp(sparsity, places, [anchor.fid for anchor in anchors]))
    if sparsity > last.sparsity:
        mean += max(0.0, (last.fid - first.fid) / (last.sparsity - first.sparsity)) * (sparsity - last.sparsity)
    mean = max(mean, min(anchor.fid for anchor in anchors[1:]))
    spread: list[tuple[float, float]] = [(anchor.sparsity, anchor.std) for anchor in anchors if anchor.std is not None]
    return mean, float(np.interp(sparsity, [place for place, _ in spread], [std for _, std in spread]))
