"""A sweep file: a base trial, the axes of each method, and how to walk them. Imports neither ray nor torch.

    name: kanjivg_small
    base: {data: {name: kanjivg}, train: {steps: 1200}}      # TrialConfig without the method
    search:                                                   # or `grid:`, whose axes are lists only
      trials: 16
      axes:
        dense: {}
        rigl: {sparsity: [0.5, 0.9], prune_ratio: {low: 0.05, high: 0.5, log: true}}
      seed_points: [{method: rigl, sparsity: 0.5, prune_ratio: 0.5}]
    asha: {grace_steps: 300, reduction_factor: 2}
    confirm: {best_per_method: 1, seeds: [1, 2, 3]}
    resources: {cpus_per_worker: 1}
    storage: {checkpoints: 50GB}

An axis is a setting of the method, or a dotted path into TrialConfig such as `optimizer.lr`. With several objectives,
`search: {objectives: [fid, flops_inference], ...}`, the search is for their Pareto front and confirm re-runs that.
`base: {evaluate: {intermediate: {generated: 500, ddim_steps: 20}}}` makes the FIDs before the last step cheaper ones.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self, get_args

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from raysparse import config
from raysparse.asha import Asha
from raysparse.config import Section, TrialConfig, as_before
from raysparse.errors import UsageError, unknown, usage_error_from
from raysparse.files import size_bytes
from raysparse.sparse.settings import of_method

Point = dict[str, Any]  # {"method": "rigl", "sparsity": 0.9, "optimizer.lr": 1e-3, ...}
OBJECTIVES = ("fid", "flops_inference", "flops_train", "params_active")  # all are made small; FLOPs, true convention
# Settings that earlier versions did not have: at these values a sweep is what it was, and so is its digest.
LATER: tuple[tuple[str, str, Any], ...] = (
    ("search", "objectives", ["fid"]),
    ("confirm", "front", 6),
    ("asha", "rungs", []),
    ("asha", "explore_first", False),
    ("asha", "second_chances", 0),
)
RAY_UNIT = 1e-4  # Ray counts resources in ten-thousandths
_COMBINATIONS = 2_000  # of one method's settings that are checked before a sweep; a check takes .2 ms
_OF_A_RANGE = 1_000  # so many of its numbers are
# What names a file or a folder: a relative one counts from where the sweep was started.
FILES = ("data.source", "data.root", "evaluate.weights", "first_stage.weights", "sparse.teacher")
_FILE_AXES = {"teacher": "sparse.teacher"} | {path: path for path in FILES}  # a method's own axis has no dot
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
Axes = dict[str, dict[str, Axis]]  # method -> axis -> values


class Search(Section):
    trials: int = Field(ge=1)
    axes: Axes
    sampler: str = Field("tpe", pattern="^(tpe|random)$")
    seed: int = Field(0, ge=0)  # of the sampler
    seed_points: tuple[Point, ...] = ()  # run first, e.g. the paper's settings
    objectives: tuple[str, ...] = ("fid",)  # several: a search for their Pareto front; ASHA still stops by FID

    @field_validator("objectives")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in OBJECTIVES:
                raise ValueError(unknown("objective", name, OBJECTIVES))
        if len(set(names)) < len(names) or "fid" not in names:
            raise ValueError(f"objectives are different ones, fid among them, got {list(names)}")
        return names


class Confirm(Section):
    """After the search: the best of each method and the dense baseline again, at full budget, on fresh seeds."""

    seeds: tuple[int, ...] = Field(min_length=1)
    best_per_method: int = Field(1, ge=1)
    front: int = Field(6, ge=1)  # with several objectives instead: so many of the Pareto front, spread along it

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds must differ, got {list(seeds)}")
        return seeds


class Resources(Section):
    workers: int = Field(1, ge=1)  # DDP processes per trial
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)  # below 1: trials share a GPU, each has that share of its memory
    max_concurrent: int | None = Field(None, ge=1)  # None: as many as fit
    # So long a trial may stand still, asleep and waiting for nothing: then it is started again. 40 s leave time to
    # write its stacks and to say why within a minute. What works, compiles, or waits for storage has half an hour.
    hung_after_s: float = Field(40, ge=1)

    @model_validator(mode="after")
    def _gpus_can_be_had(self) -> Self:
        gpus = self.gpus_per_worker
        if gpus > 1 and not gpus.is_integer():
            raise ValueError(f"gpus_per_worker above 1 must be a whole number: Ray splits no further, got {gpus:g}")
        if 0 < gpus < RAY_UNIT:
            raise ValueError(f"gpus_per_worker must be 0 or at least {RAY_UNIT:g}, which is Ray's unit, got {gpus:g}")
        if self.workers > 1 and 0 < gpus < 1:
            raise ValueError(
                f"{self.workers} workers cannot share a GPU, as gpus_per_worker {gpus:g} asks: NCCL wants one for each "
                "rank; give a whole number, or workers: 1"
            )
        return self

    def workers_on(self, cpus: float, gpus: float) -> int:
        """Workers that fit on a node, as Ray counts. A share of a GPU lies on one: of .4 four fit on two, not five.

        gpus: inf where they are not known yet.
        """
        share, fit = self.gpus_per_worker, _units(cpus) // max(1, _units(self.cpus_per_worker))
        if not share or math.isinf(gpus):
            return fit
        on_gpus = math.floor(gpus) * self.workers_per_gpu if share < 1 else math.floor(gpus / share)
        return min(fit, on_gpus)

    @property
    def workers_per_gpu(self) -> int:
        """Trials that share a GPU; 1 where one has it, or several, for itself."""
        return _units(1) // _units(self.gpus_per_worker) if 0 < self.gpus_per_worker < 1 else 1


def _units(quantity: float) -> int:
    """A resource as Ray counts it, cut off: of .1429 six fit, of 1/7 seven."""
    return math.floor(quantity / RAY_UNIT + 1e-6)


class Storage(Section):
    # Bytes that all checkpoints may take, or text such as 50GB; None: no budget. See sweep/storage.py for what is kept.
    checkpoints: int | None = Field(None, ge=1)

    @field_validator("checkpoints", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return size_bytes(value)
        except UsageError as error:
            raise ValueError(str(error)) from error


class Sweep(Section):
    """A checked sweep file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)
    base: dict[str, Any] = Field(default_factory=dict)
    grid: Axes | None = None
    search: Search | None = None
    asha: Asha | None = None
    confirm: Confirm | None = None
    resources: Resources = Resources()
    storage: Storage = Storage()

    @model_validator(mode="after")
    def _one_walk(self) -> Self:
        if (self.grid is None) == (self.search is None):
            raise ValueError("give either `grid:` or `search:`, one of the two")
        if not self.axes:
            raise ValueError("no method: name at least one, e.g. `dense: {}`")
        base = parsed_base(self)
        if self.confirm and base.seed in self.confirm.seeds:
            # The search's seed is the one that a winner was lucky with: counting it again would flatter the winner.
            raise ValueError(f"confirm.seeds {list(self.confirm.seeds)} contain the search's own seed {base.seed}")
        for name, step in self.asha.given_steps if self.asha else ():
            if step >= base.train.steps:
                raise ValueError(f"asha.{name} {step} is not below train.steps {base.train.steps}")
            if step % base.evaluate.every_steps:
                raise ValueError(
                    f"asha.{name} {step} is not a multiple of evaluate.every_steps {base.evaluate.every_steps}: there "
                    "would be no FID at that rung"
                )
        if base.train.batch_size % (self.resources.workers * base.train.accumulate):
            raise ValueError(
                f"train.batch_size {base.train.batch_size} cannot be shared by {self.resources.workers} workers "
                f"x {base.train.accumulate} accumulation steps"
            )
        for method, axes in self.axes.items():
            _check_axes(self, method, axes)
        for point in self.search.seed_points if self.search else ():
            check_point(self, point)
        if self.grid is not None:
            grid_points(self)  # every combination is a legal trial
        return self

    @property
    def axes(self) -> Axes:
        return self.search.axes if self.search else self.grid or {}

    @property
    def digest(self) -> str:
        """Of everything that the sweep computes: two files with the same digest are the same sweep."""
        content = self.model_dump(mode="json", exclude={"storage": True, "resources": {"hung_after_s"}})
        content = as_before(content, LATER)
        content["base"] = parsed_base(self).content() | {"sparse": self.base.get("sparse", {})}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class _UniqueKeys(yaml.SafeLoader):
    """The safe loader, with a key that stands twice refused instead of the first one forgotten."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if isinstance(key, str) and keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML file with a mapping at the top. UsageError naming the file and the line."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UsageError(f"{path} must be a mapping such as `name: ...`, got {type(data).__name__}")
    return data


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> Sweep:
    """Read and check a sweep file; `overrides` are dotted paths into the file, e.g. {"base.train.steps": 100}."""
    return changed({"name": path.stem} | load_yaml(path), overrides or {}, str(path))


def changed(data: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> Sweep:
    """A checked sweep from a mapping with other values at dotted paths. UsageError as `parse`."""
    for name, value in overrides.items():
        data = config.with_value(data, name, value)
    return parse(data, where)


def parse(data: Mapping[str, Any], where: str) -> Sweep:
    """A checked sweep from a mapping. UsageError with a line per complaint."""
    try:
        return Sweep.model_validate(data)
    except ValidationError as error:
        raise usage_error_from(error, where, Sweep) from None


def parsed_base(sweep: Sweep) -> TrialConfig:
    """The base trial, without a method of its own (dense)."""
    shared = sweep.base.get("sparse", {})
    if not isinstance(shared, Mapping):
        raise ValueError(f"base.sparse must be a mapping, got {shared!r}")
    known = config.all_settings()
    for name in shared:
        if name not in known:
            raise ValueError("base.sparse: " + unknown("key", name, known))
    return _trial(sweep, {key: value for key, value in sweep.base.items() if key != "sparse"}, "base")


def trial(sweep: Sweep, point: Point, *, seed: int | None = None) -> TrialConfig:
    """The trial at a point. Settings in `base.sparse` count for the methods that have them."""
    data, known = base_data(sweep, point["method"]), config.all_settings()
    for name, value in point.items():
        if name != "method":
            data = config.with_value(data, f"sparse.{name}" if name in known else name, value)
    if seed is not None:
        data = {**data, "seed": seed}
    return _trial(sweep, data, f"{sweep.name}, {point}")


def base_data(sweep: Sweep, method: str) -> dict[str, Any]:
    """The base trial as plain data, with a method and the shared settings that it has."""
    settings = config.method_settings(method)
    shared = {name: value for name, value in sweep.base.get("sparse", {}).items() if name in settings}
    return {**sweep.base, "sparse": {**shared, "method": method}}


def grid_points(sweep: Sweep) -> list[Point]:
    """Every combination of a grid that is another trial, method by method in the order of the file.

    dense comes first where the file does not name it. ValueError: values that do not go together.
    """
    points: list[Point] = [] if "dense" in (sweep.grid or {}) else [{"method": "dense"}]
    for method, axes in (sweep.grid or {}).items():
        values = [axis for axis in axes.values() if isinstance(axis, tuple)]
        points += [{"method": method, **dict(zip(axes, row, strict=True))} for row in itertools.product(*values)]
    # What has no effect (the size of a block where there is none) makes no other trial.
    return list({trial(sweep, point).trial_id: point for point in reversed(points)}.values())[::-1]


def own_points(sweep: Sweep, method: str) -> Iterator[Point]:
    """A method's own settings in every combination of choices and of ranges' ends, or in many; no dotted axis."""
    known = config.all_settings()
    own = {name: _ends(method, name, axis) for name, axis in sweep.axes[method].items() if name in known}
    for row in itertools.islice(itertools.product(*own.values()), _COMBINATIONS):
        yield {"method": method, **dict(zip(own, row, strict=True))}


def trial_count(sweep: Sweep) -> int:
    """Trials of the search stage."""
    return sweep.search.trials if sweep.search else len(grid_points(sweep))


def with_places(sweep: Sweep, change: Callable[[str, str], str]) -> Sweep:
    """The sweep with `change(where, place)` for each of its FILES, in the base trial and among the axes.

    where: dotted, in the file. An id of the Hub is no place.
    """

    def changed(path: str, where: str, value: Any) -> Any:
        hub_id = path == "first_stage.weights" and isinstance(value, str) and not Path(value).expanduser().exists()
        return value if not isinstance(value, str) or hub_id else change(where, value)

    content = sweep.model_dump(mode="json")
    for path in FILES:
        section, name = path.split(".")
        if (value := (content["base"].get(section) or {}).get(name)) is not None:
            content["base"] = config.with_value(content["base"], path, changed(path, f"base.{path}", value))
    walk, walked = ("search.axes", content["search"]["axes"]) if sweep.search else ("grid", content["grid"])
    for method, axes in walked.items():
        for name in axes.keys() & _FILE_AXES.keys():
            axes[name] = [changed(_FILE_AXES[name], f"{walk}.{method}.{name}", value) for value in axes[name]]
    for point in content["search"]["seed_points"] if sweep.search else ():
        for name in point.keys() & _FILE_AXES.keys():
            point[name] = changed(_FILE_AXES[name], "search.seed_points", point[name])
    return parse(content, sweep.name)


def _trial(sweep: Sweep, data: Mapping[str, Any], where: str) -> TrialConfig:
    try:
        return TrialConfig.model_validate(data)
    except ValidationError as error:
        raise ValueError(str(usage_error_from(error, where, TrialConfig))) from None


def _check_axes(sweep: Sweep, method: str, axes: Mapping[str, Axis]) -> None:
    settings, known = config.method_settings(method), config.all_settings()
    for name, axis in axes.items():
        if name in known and name not in settings:
            raise ValueError(f"method {method!r} has no axis {name!r}; it has {', '.join(sorted(settings)) or 'none'}")
        if "." not in name and name not in known:
            raise ValueError(
                f"{method}: " + unknown("axis", name, settings) + "; or a dotted path such as optimizer.lr"
            )
        if name.startswith("evaluate.intermediate"):
            raise ValueError(
                f"{name} is not an axis: trials are compared by the intermediate FID, so all have the same"
            )
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
        if sweep.grid is not None and isinstance(axis, Range):
            raise ValueError(f"{method}.{name}: a grid takes a list of values, got a range; use `search:` for ranges")
    # Every choice, and what a range may draw, must be a legal trial now rather than fail in the middle of a sweep: the
    # method's own settings in every combination, because one decides what another may be, and each axis by itself.
    for first in own_points(sweep, method):
        trial(sweep, first)
    for name, axis in axes.items():
        for value in _choices(method, name, axis, _OF_A_RANGE):
            try:
                trial(sweep, {**first, name: value})
            except ValueError as error:
                if not isinstance(axis, Range):
                    raise
                raise ValueError(f"{error}; a range is drawn from as a whole: give a fitting step, or a list") from None


def _choices(method: str, name: str, axis: Axis, most: int) -> tuple[Any, ...]:
    """Every choice of a list; of a range what may be drawn, as `Range.drawn`."""
    return axis.drawn(most, is_integer(method, name, axis)) if isinstance(axis, Range) else axis


def _ends(method: str, name: str, axis: Axis) -> tuple[Any, ...]:
    """Every choice of a list, both ends of a range."""
    choices = _choices(method, name, axis, 1)
    return (choices[0], choices[-1]) if isinstance(axis, Range) else choices


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


def check_point(sweep: Sweep, point: Point) -> None:
    """ValueError where a point is not one of the sweep's space."""
    method = point.get("method")
    if method not in sweep.axes:
        raise ValueError(f"seed point {point}: method must be one of {', '.join(sweep.axes)}, got {method!r}")
    for name, value in point.items():
        if name == "method":
            continue
        if name not in sweep.axes[method]:
            raise ValueError(f"seed point {point}: " + unknown("axis", name, sweep.axes[method]) + f" (of {method})")
        axis = sweep.axes[method][name]
        inside = value in axis if isinstance(axis, tuple) else axis.low <= value <= axis.high
        if not inside:
            raise ValueError(f"seed point {point}: {name} = {value!r} lies outside its axis {axis}")
    trial(sweep, point)
