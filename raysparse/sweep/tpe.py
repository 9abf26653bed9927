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
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers._tpe.sampler import default_gamma
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

WHOLE = 300  # up to so many trials Optuna's own sampler is used, whose model is made of all; beyond, of
BEST = 25  # the best of all, more is never in the lower part of Optuna's split,
SPREAD = 75  # some evenly spread over all that have ended: of the latest only, it forgot which regions are poor,
LATEST = 25  # and the latest that run
MODELLED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


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
        self._numbers: dict[tuple[str, ...], dict[int, list[float] | None]] = {}  # by axes, by trial

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
        trials = [each for each in self.window(study) if each.number != trial.number]
        ended = sum(each.state != TrialState.RUNNING for each in trials)
        if ended < self._n_startup_trials:
            return {}
        best = {each.number for _, each in self._best[: default_gamma(ended)]}
        good = [each for each in trials if each.number in best]
        poor = [each for each in trials if each.number not in best]
        chosen = self._likeliest(study, {n: kind for n, kind in search_space.items() if "." not in n}, good, poor)
        of_method = tuple(f"{method}." for method in chosen.values()) or tuple(search_space)
        axes = {name: kind for name, kind in search_space.items() if name.startswith(of_method) and "." in name}
        return chosen | self._likeliest(study, axes, good, poor)

    def _likeliest(
        self, study: Any, space: dict[str, BaseDistribution], good: list[FrozenTrial], poor: list[FrozenTrial]
    ) -> dict[str, Any]:
        """Of Optuna's candidates, drawn as the good ones are, the one that is the least like the poor ones."""
        if not space:
            return {}
        below = self._build_parzen_estimator(study, space, good, handle_below=True)
        above = self._build_parzen_estimator(study, space, poor, handle_below=False)
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
        if len(trials) > WHOLE:
            best = (trial for _, trial in self._best)
            spread = (trial for trial in trials[:: -(-len(trials) // SPREAD)] if trial.state.is_finished())
            running = (trial for trial in reversed(trials) if trial.state == TrialState.RUNNING)
            kept = {trial.number: trial for trial in (*best, *spread, *itertools.islice(running, LATEST))}
            trials = [kept[number] for number in sorted(kept)]
        return [trial for trial in trials if trial.state in MODELLED]

    def _get_internal_repr(
        self, trials: list[FrozenTrial], search_space: dict[str, BaseDistribution], study: optuna.Study
    ) -> dict[str, NDArray[Any]]:
        """As Optuna's, which converts the parameters of each trial again for each suggestion.

        trials: not the one that is being drawn, whose parameters are still to come.
        """
        known = self._numbers.setdefault(tuple(search_space), {})
        for trial in trials:
            if trial.number not in known:
                params = trial.params
                known[trial.number] = (
                    [kind.to_internal_repr(params[name]) for name, kind in search_space.items()]
                    if search_space.keys() <= params.keys()
                    else None
                )
        rows = [row for trial in trials if (row := known[trial.number]) is not None]
        columns = np.array(rows, dtype=np.float64).reshape(len(rows), len(search_space)).T
        return dict(zip(search_space, columns, strict=True))


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
