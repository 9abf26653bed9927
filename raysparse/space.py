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
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from raysparse import config
from raysparse.asha import Asha
from raysparse.axis import Axes, Axis, Range, check_axis, choices, ends
from raysparse.config import LARGEST_SWEEP, Recorded, TrialConfig, as_before
from raysparse.errors import UsageError, unknown, usage_error_from
from raysparse.files import size_bytes
from raysparse.resources import Resources
from raysparse.section import Section

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
_COMBINATIONS = 2_000  # of one method's settings that are checked before a sweep; a check takes .2 ms
_OF_A_RANGE = 1_000  # so many of its numbers are
# What names a file or a folder: a relative one counts from where the sweep was started.
FILES = ("data.source", "data.root", "evaluate.weights", "first_stage.weights", "sparse.teacher")
_FILE_AXES = {"teacher": "sparse.teacher"} | {path: path for path in FILES}  # a method's own axis has no dot


class Search(Section):
    trials: int = Field(ge=1, le=LARGEST_SWEEP)
    axes: Axes
    sampler: str = Field("tpe", pattern="^(tpe|random)$")
    seed: Recorded = Field(0, ge=0)  # of the sampler
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

    seeds: tuple[Annotated[Recorded, Field(ge=0)], ...] = Field(min_length=1, max_length=1000)
    best_per_method: int = Field(1, ge=1, le=LARGEST_SWEEP)
    # With several objectives instead: so many of the Pareto front, spread along it
    front: int = Field(6, ge=1, le=LARGEST_SWEEP)

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds must differ, got {list(seeds)}")
        return seeds


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
        for method, axes in self.axes.items():
            _check_axes(self, method, axes)
        for point in self.search.seed_points if self.search else ():
            check_point(self, point)
        if self.grid is not None:
            _check_size(self.grid)
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


class _Loader(yaml.SafeLoader):
    """The safe loader, with a key that stands twice refused instead of the first one forgotten, and with 1e-3 a number
    as in YAML 1.2 and JSON: in YAML 1.1 it is text, which a setting takes for its number but no other number equals."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if isinstance(key, str) and keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str) -> Any:
    """What a YAML text says. yaml.YAMLError, RecursionError, or ValueError (of a date that there is not)."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML file with a mapping at the top. UsageError naming the file and the line."""
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{path} must be a mapping such as `name: ...`, got {type(data).__name__}")
    if numbers := [key for key in data if not isinstance(key, str)]:
        raise UsageError(f"{path} must be a mapping of names such as `name: ...`, got the key {numbers[0]!r}")
    return data


def load(path: Path, overrides: Mapping[str, Any] | None = None) -> Sweep:
    """Read and check a sweep file; `overrides` are dotted paths into the file, e.g. {"base.train.steps": 100}."""
    sweep = changed({"name": path.stem} | load_yaml(path), overrides or {}, str(path))
    # Not in `parse`: a sweep that began with such values in an older version can still be read and resumed.
    for method, axes in sweep.axes.items():
        for name, axis in axes.items():
            values = axis if isinstance(axis, tuple) else ()
            if twice := [value for place, value in enumerate(values) if value in values[:place]]:
                what = f"got {list(values)}; leave out the second {twice[0]!r}"
                raise UsageError(f"{path}: {method}.{name}: values must differ, {what}")
    return sweep


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
    own = {name: ends(method, name, axis) for name, axis in sweep.axes[method].items() if name in known}
    for row in itertools.islice(itertools.product(*own.values()), _COMBINATIONS):
        yield {"method": method, **dict(zip(own, row, strict=True))}


def tried_points(sweep: Sweep, *, choices: bool = True) -> Iterator[Point]:
    """What is tried before a sweep starts, for later it would be a failed trial: every point of a grid; of a search
    dense, the seed points, the methods' own points, and with `choices` each one or end of a dotted axis by itself."""
    if sweep.search is None:
        yield from grid_points(sweep)
        return
    yield from ({"method": "dense"}, *sweep.search.seed_points)
    for method, axes in sweep.axes.items():
        for own in own_points(sweep, method):
            yield own
        dotted = {name: axis for name, axis in axes.items() if "." in name and choices}
        yield from ({**own, name: value} for name, axis in dotted.items() for value in ends(method, name, axis))


def trial_count(sweep: Sweep) -> int:
    """Trials of the search stage."""
    return sweep.search.trials if sweep.search else len(grid_points(sweep))


def with_places(sweep: Sweep, change: Callable[[str, str], str]) -> Sweep:
    """The sweep with `change(where, place)` for each of its FILES, in the base trial and among the axes.

    where: dotted, in the file. An id of the Hub is no place, and neither is a teacher left out.
    """

    def changed(path: str, where: str, value: Any) -> Any:
        hub_id = path == "first_stage.weights" and isinstance(value, str) and not Path(value).expanduser().exists()
        left_out = path == "sparse.teacher" and value == config.LEFT_OUT
        return value if not isinstance(value, str) or hub_id or left_out else change(where, value)

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
        trial = TrialConfig.model_validate(data)
    except ValidationError as error:
        raise ValueError(str(usage_error_from(error, where, TrialConfig))) from None
    try:
        trial.train.share(sweep.resources.workers)
    except UsageError as error:
        raise ValueError(f"{where}: {error}") from None
    if trial.train.cuda_graph and (workers := sweep.resources.workers) > 1:
        raise ValueError(f"{where}: train.cuda_graph is for one worker, but resources.workers is {workers}")
    return trial


def _check_size(grid: Axes) -> None:
    lists = [[axis for axis in axes.values() if isinstance(axis, tuple)] for axes in grid.values()]
    count = sum(math.prod(map(len, values)) for values in lists)
    if count > LARGEST_SWEEP:
        raise ValueError(f"the grid has {count:,} combinations, at most {LARGEST_SWEEP:,}; use `search:` to try some")


def _check_axes(sweep: Sweep, method: str, axes: Mapping[str, Axis]) -> None:
    for name, values in axes.items():
        check_axis(method, name, values)
        if sweep.grid is not None and isinstance(values, Range):
            raise ValueError(f"{method}.{name}: a grid takes a list of values, got a range; use `search:` for ranges")
    # Every choice, and what a range may draw, must be a legal trial now rather than fail in the middle of a sweep: the
    # method's own settings in every combination, because one decides what another may be, and each axis by itself.
    for first in own_points(sweep, method):
        trial(sweep, first)
    for name, axis in axes.items():
        for value in choices(method, name, axis, _OF_A_RANGE):
            try:
                trial(sweep, {**first, name: value})
            except ValueError as error:
                if not isinstance(axis, Range):
                    raise
                raise ValueError(f"{error}; a range is drawn from as a whole: give a fitting step, or a list") from None


def check_point(sweep: Sweep, point: Point) -> None:
    """ValueError where a point is not one of the sweep's space."""
    method = point.get("method")
    if not isinstance(method, str) or method not in sweep.axes:
        raise ValueError(f"seed point {point}: method must be one of {', '.join(sweep.axes)}, got {method!r}")
    for name, value in point.items():
        if name == "method":
            continue
        if name not in sweep.axes[method]:
            raise ValueError(f"seed point {point}: " + unknown("axis", name, sweep.axes[method]) + f" (of {method})")
        axis = sweep.axes[method][name]
        if isinstance(axis, tuple):
            inside = value in axis
        else:
            inside = isinstance(value, int | float) and axis.low <= value <= axis.high
        if not inside:
            raise ValueError(f"seed point {point}: {name} = {value!r} lies outside its axis {axis}")
    trial(sweep, point)
