"""A sweep's axes in Optuna's words: the method first, then the axes of that method, named like `rigl.sparsity`.

A method without axes (dense) is one point. It is run once and is no choice of the sampler: it would be suggested again
and again, and its good FID would pull TPE to a corner with nothing to find.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from raysparse import rng
from raysparse.axis import Axis, Range, is_integer
from raysparse.space import Point, Search
from raysparse.sweep.tpe import WHOLE, ParetoTPE, WindowedTPE

METHOD = "method"
DRAWS = 20  # of a method, for a point that is new
optuna.logging.set_verbosity(optuna.logging.WARNING)  # the terminal is the command line's


def suggest(trial: optuna.Trial, search: Search) -> Point:
    """Draw one point, define-by-run."""
    known = distributions(search)
    params = {METHOD: _draw(trial, METHOD, known[METHOD])}
    for axis in search.axes[params[METHOD]]:
        name = f"{params[METHOD]}.{axis}"
        params[name] = _draw(trial, name, known[name])
    return to_point(search, params)


def distributions(search: Search) -> dict[str, BaseDistribution]:
    """Of the method and of every axis of every method."""
    found: dict[str, BaseDistribution] = {}
    methods = [method for method, axes in search.axes.items() if axes]
    if methods:
        found[METHOD] = CategoricalDistribution(methods)
    for method, axes in search.axes.items():
        found |= {f"{method}.{name}": _distribution(method, name, axis) for name, axis in axes.items()}
    return found


def to_params(search: Search, point: Point) -> dict[str, Any]:
    """A point, or a part of one, as Optuna's parameters; {} for a method without axes."""
    method = point[METHOD]
    if not search.axes.get(method):
        return {}
    values = {f"{method}.{name}": _choice(value) for name, value in point.items() if name != METHOD}
    return {METHOD: method, **values}


def to_point(search: Search, params: dict[str, Any]) -> Point:
    """Optuna's parameters as a point."""
    method = params[METHOD]
    point: Point = {METHOD: method}
    for name, axis in search.axes[method].items():
        value = params[f"{method}.{name}"]
        if isinstance(axis, tuple):
            value = next(choice for choice in axis if _choice(choice) == value)
        point[name] = value
    return point


def first_points(search: Search) -> list[Point]:
    """Tried before the sampler is free: dense, methods that are one point, seed points, then each method not yet met.

    A point may lack axes of its method: the sampler draws those.
    """
    seeded = {point[METHOD] for point in search.seed_points}
    single = [{METHOD: m} for m, axes in search.axes.items() if not axes and m != "dense" and m not in seeded]
    points = [*single, *search.seed_points]
    baseline: list[Point] = [] if "dense" in seeded else [{METHOD: "dense"}]
    met = {point[METHOD] for point in points}
    return [*baseline, *points, *({METHOD: m} for m in search.axes if m not in met and m != "dense")]


def all_points(search: Search) -> list[Point] | None:
    """Every point of a space of lists; None where an axis is a range."""
    points: list[Point] = []
    for method, axes in search.axes.items():
        if any(isinstance(axis, Range) for axis in axes.values()):
            return None
        points += [{METHOD: method, **dict(zip(axes, row, strict=True))} for row in itertools.product(*axes.values())]
    return points


def new_point(search: Search, seed: int, known: Callable[[Point], bool]) -> Point | None:
    """A point that is not known, drawn without regard to what is good; None where all are known."""
    points = all_points(search)
    if points is not None:
        left = [point for point in points if not known(point)]
        return left[seed % len(left)] if left else None
    draws = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed % 2**32))
    kinds = distributions(search)
    methods = sorted(search.axes, key=lambda method: rng.key(seed, method))

    def drawn(method: str) -> Point:
        asked = draws.ask({name: kinds[name] for name in (f"{method}.{axis}" for axis in search.axes[method])})
        return to_point(search, {METHOD: method, **asked.params})

    # Of many points a few draws find a new one; few points, and those with axes that have no effect, are walked.
    some = (drawn(method) for method in methods for _ in range(DRAWS))
    walked = (point for method in methods for point in _walk(search, method, kinds))
    return next((point for point in itertools.chain(some, walked) if not known(point)), None)


def _walk(search: Search, method: str, kinds: dict[str, BaseDistribution]) -> Iterator[Point]:
    names = [f"{method}.{axis}" for axis in search.axes[method]]
    for row in itertools.product(*(_values(kinds[name]) for name in names)):
        yield to_point(search, {METHOD: method, **dict(zip(names, row, strict=True))})


def sampler(search: Search, number: int, windowed: WindowedTPE) -> optuna.samplers.BaseSampler:
    """The sampler of the trial with this number: as if made for it alone, so that a resumed search draws the same.

    windowed: told by the caller of all that has ended. Beyond tpe.WHOLE trials Optuna's own TPE grows too slow.
    """
    seed = rng.key(search.seed, "optuna", step=number) % 2**32
    windowed.reseed(seed)
    if search.sampler == "random":
        return windowed.random
    if number >= WHOLE and len(search.objectives) == 1:
        return windowed
    with quiet():
        if len(search.objectives) > 1:
            return ParetoTPE(search.objectives, seed)
        # Several axes at once, groups for the nested ones, and running trials counted as poor: workers spread out.
        return optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's reminder that multivariate TPE is experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def _distribution(method: str, name: str, axis: Axis) -> BaseDistribution:
    if not isinstance(axis, Range):
        return CategoricalDistribution([_choice(value) for value in axis])
    if is_integer(method, name, axis):
        return IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1))
    high = axis.high
    if axis.step:  # Optuna wants the last multiple as the end; the 1e-9 is for 0.05 + 17 * 0.05
        high = axis.low + math.floor((axis.high - axis.low) / axis.step + 1e-9) * axis.step
    return FloatDistribution(axis.low, high, log=axis.log, step=axis.step)


def _values(kind: BaseDistribution) -> Sequence[Any]:
    """All that can be drawn; of a range without steps, which has no end, its lower end."""
    match kind:
        case CategoricalDistribution():
            return kind.choices
        case IntDistribution():
            return range(kind.low, kind.high + 1, kind.step)
        case FloatDistribution(step=None):
            return (kind.low,)
        case FloatDistribution(step=float(step)):
            return [min(kind.low + n * step, kind.high) for n in range(round((kind.high - kind.low) / step) + 1)]
    raise AssertionError(kind)


def _draw(trial: optuna.Trial, name: str, kind: BaseDistribution) -> Any:
    match kind:
        case CategoricalDistribution():
            return trial.suggest_categorical(name, kind.choices)
        case IntDistribution():
            return trial.suggest_int(name, kind.low, kind.high, step=kind.step, log=kind.log)
        case FloatDistribution():
            return trial.suggest_float(name, kind.low, kind.high, step=kind.step, log=kind.log)
    raise AssertionError(kind)


def _choice(value: Any) -> Any:
    """Optuna's choices are scalars; a list such as `betas` goes as JSON text."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)
