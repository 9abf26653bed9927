"""TPE for long sweeps, whose suggestions cost the same however many trials there are; and TPE for several objectives.

As Optuna has it, each suggestion sorts all trials and puts a kernel on every one, for every group of axes: 16 ms of CPU
a trial over a search of 500 (two busy cores), and growing with their number. What is far from the best says little one
by one, so beyond 300 trials the model is made of the best and of a sample of the others.
"""

from __future__ import annotations

import bisect
import copy
import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import optuna
import scipy.special
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers._tpe import _truncnorm
from optuna.samplers._tpe.sampler import default_gamma
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

WHOLE = 300  # up to so many trials Optuna's own sampler is used, whose model is made of all; beyond, of
BEST = 25  # the best of all, more is never in the lower part of Optuna's split,
SPREAD = 75  # some evenly spread over all that have ended: of the latest only, it forgot which regions are poor,
LATEST = 25  # and the latest that run
MODELLED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)

# Optuna, which does without scipy, computes this number by number in Python: .15 of the driver's time. Same to 1e-12.
_truncnorm._log_ndtr = scipy.special.log_ndtr


class WindowedTPE(optuna.samplers.TPESampler):
    """Multivariate TPE over nested axes, with running trials counted as poor, so that workers spread out.

    One for a whole search, told of each trial that ends; what it draws next depends on those and on `reseed` only.
    """

    def __init__(self, space: dict[str, BaseDistribution]) -> None:
        """space: of the method, a name without a dot, and of every axis, `method.axis`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            super().__init__(multivariate=True, constant_liar=True, seed=0)
        self._space = {name: kind for name, kind in sorted(space.items()) if not kind.single()}
        self._best: list[tuple[tuple[float, float, int], FrozenTrial]] = []
        self._observed: dict[tuple[str, ...], _Observed] = {}  # by axes

    def reseed(self, seed: int) -> None:
        """As if made anew with this seed, which takes .55 ms, a tenth of a suggestion; this takes .006."""
        self._rng.rng.seed(seed)
        self._random_sampler._rng.rng.seed(seed)

    @property
    def random(self) -> optuna.samplers.RandomSampler:
        """A sampler that learns nothing, with the same seed."""
        return self._random_sampler

    def learn(self, trial: FrozenTrial) -> None:
        """Take in a trial that has just ended; `trial` as the study now has it.

        The best are told by last step, then value, as TPE ranks those that were stopped.
        """
        if trial.state == TrialState.COMPLETE and trial.values:
            key = (-float("inf"), trial.values[0], trial.number)
        elif trial.state == TrialState.PRUNED and trial.intermediate_values:
            step = max(trial.intermediate_values)
            key = (-float(step), trial.intermediate_values[step], trial.number)
        else:
            return
        bisect.insort(self._best, (key, trial), key=lambda kept: kept[0])
        del self._best[BEST:]

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space  # known; Optuna's own would gather it from all trials, and drop what not all of them have

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The method, then the axes of that method only, from the trials that have them.

        As Optuna's of either group, but its two parts, the good and the poor trials, are found once for both, and from
        the ranks that are known instead of by sorting.
        """
        trials = study.get_trials(deepcopy=False)
        numbers = [number for number in self._window(trials) if number != trial.number]
        ended = sum(trials[number].state != TrialState.RUNNING for number in numbers)
        if ended < self._n_startup_trials:
            return {}
        best = {kept.number for _, kept in self._best[: default_gamma(ended)]}
        good = [number for number in numbers if number in best]
        poor = [number for number in numbers if number not in best]
        chosen = self._likeliest({n: kind for n, kind in search_space.items() if "." not in n}, trials, good, poor)
        of_method = tuple(f"{method}." for method in chosen.values()) or tuple(search_space)
        axes = {name: kind for name, kind in search_space.items() if name.startswith(of_method) and "." in name}
        return chosen | self._likeliest(axes, trials, good, poor)

    def _likeliest(
        self, space: dict[str, BaseDistribution], trials: list[FrozenTrial], good: list[int], poor: list[int]
    ) -> dict[str, Any]:
        """Of Optuna's candidates, drawn as the good ones are, the one that is the least like the poor ones."""
        if not space:
            return {}
        observed = self._observed.setdefault(tuple(space), _Observed(space))
        below, above = (
            self._parzen_estimator_cls(observed.of(numbers, trials), space, self._parzen_estimator_parameters)
            for numbers in (good, poor)
        )
        candidates = below.sample(self._rng.rng, self._n_ei_candidates)
        best = self._compare(candidates, self._compute_acquisition_func(candidates, below, above))
        return {name: kind.to_external_repr(best[name]) for name, kind in space.items()}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        view: Any = _View(study, self.window(study))
        return super().sample_independent(view, trial, param_name, param_distribution)

    def window(self, study: optuna.Study) -> list[FrozenTrial]:
        """The trials that the model is made of, by number."""
        trials = study.get_trials(deepcopy=False)
        return [trials[number] for number in self._window(trials)]

    def _window(self, trials: list[FrozenTrial]) -> list[int]:
        """Their numbers, rising, which are their places in the study."""
        kept: Iterable[int] = range(len(trials))
        if len(trials) > WHOLE:
            best = [trial.number for _, trial in self._best]
            spread = (n for n in range(0, len(trials), -(-len(trials) // SPREAD)) if trials[n].state in ENDED)
            running = (n for n in range(len(trials) - 1, -1, -1) if trials[n].state == TrialState.RUNNING)
            kept = sorted({*best, *spread, *itertools.islice(running, LATEST)})
        return [number for number in kept if trials[number].state in MODELLED]


class _Observed:
    """The parameters of trials as Optuna's numbers, converted once: Optuna does it again for each suggestion."""

    def __init__(self, space: dict[str, BaseDistribution]) -> None:
        self._space = space
        self._rows = np.empty((0, len(space)))  # by trial; NaN where it does not have these axes
        self._known = np.empty(0, dtype=bool)

    def of(self, numbers: list[int], trials: list[FrozenTrial]) -> dict[str, NDArray[Any]]:
        """axis -> its values in those of the trials that have it. None of them may still be drawn."""
        missing = len(trials) - len(self._known)
        if missing > 0:
            missing += len(trials)  # twice as many as there are: copied seldom
            self._rows = np.concatenate((self._rows, np.empty((missing, len(self._space)))))
            self._known = np.concatenate((self._known, np.zeros(missing, dtype=bool)))
        chosen = np.array(numbers, dtype=np.intp)
        for number in chosen[~self._known[chosen]]:
            params = trials[number].params
            self._rows[number] = (
                [kind.to_internal_repr(params[name]) for name, kind in self._space.items()]
                if self._space.keys() <= params.keys()
                else np.nan
            )
            self._known[number] = True
        rows = self._rows[chosen]
        return dict(zip(self._space, rows[~np.isnan(rows[:, 0])].T, strict=True))


class ParetoTPE(optuna.samplers.TPESampler):
    """Optuna's TPE for several objectives, which also knows how far those trials came that ASHA stopped.

    As Optuna has it, trials that were stopped are all alike with several objectives, and where few are completed any of
    them may pass for good. Here they are ranked as with one objective: who came further is better, and at the same step
    the one that fewer of the others beat in every objective, its FID there taken for its FID. Its model is made of all
    trials: 25 ms a suggestion at 600 of them, and growing.
    """

    def __init__(self, objectives: Sequence[str], seed: int) -> None:
        """objectives: FID and names of user attributes of the trials."""
        super().__init__(multivariate=True, group=True, constant_liar=True, seed=seed)
        self._costs = [name for name in objectives if name != "fid"]

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return super().sample_relative(self._ranked(study), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return super().sample_independent(self._ranked(study), trial, param_name, param_distribution)

    def _ranked(self, study: optuna.Study) -> Any:
        trials = list(study.get_trials(deepcopy=False))
        stopped = [n for n, t in enumerate(trials) if t.state == TrialState.PRUNED and t.intermediate_values]
        by_step: dict[int, list[int]] = {}
        for number in stopped:
            by_step.setdefault(max(trials[number].intermediate_values), []).append(number)
        for step, numbers in by_step.items():
            rows = [trials[n] for n in numbers]
            points = np.array([[t.intermediate_values[step], *(t.user_attrs[c] for c in self._costs)] for t in rows])
            beaten_by = (points[:, None] <= points).all(-1) & (points[:, None] < points).any(-1)
            for number, count in zip(numbers, beaten_by.sum(0), strict=True):
                trials[number] = copy.copy(trials[number])
                trials[number].intermediate_values = {step: float(count)}
        return _View(study, trials)


class _View:
    """A study of which only a window of trials is seen."""

    direction = StudyDirection.MINIMIZE  # of what trials that were stopped are ranked by

    def __init__(self, study: optuna.Study, window: list[FrozenTrial]) -> None:
        self._study, self._window = study, window

    def _get_trials(self, deepcopy: bool = True, states: Any = None, use_cache: bool = False) -> list[FrozenTrial]:
        return [trial for trial in self._window if states is None or trial.state in states]

    def get_trials(self, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        return self._get_trials(states=states)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)
