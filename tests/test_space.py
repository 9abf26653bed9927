"""Sweep files: the walk over the axes, and everything that a file may get wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raysparse import cli, space
from raysparse.errors import UsageError

BASE: dict[str, Any] = {"train": {"steps": 100}, "evaluate": {"every_steps": 10}}
GRID = {
    "dense": {},
    "static": {"sparsity": [0.5, 0.9]},
    "rigl": {"sparsity": [0.5], "prune_ratio": [0.05, 0.5], "update_interval": [5]},
}
FOUR = ("sparsity", "prune_ratio", "update_end_fraction", "optimizer.weight_decay")


def sweep(**changes: Any) -> space.Sweep:
    return space.parse({"name": "s", "base": BASE, "grid": GRID} | changes, "s.yaml")


def test_a_grid_walks_every_combination_method_by_method() -> None:
    trials = [space.trial(sweep(), point) for point in space.grid_points(sweep())]
    got = [(t.sparse.method, t.sparse.sparsity, t.sparse.prune_ratio) for t in trials]
    assert got == [
        ("dense", None, None),
        ("static", 0.5, None),
        ("static", 0.9, None),
        ("rigl", 0.5, 0.05),
        ("rigl", 0.5, 0.5),
    ]
    assert len({t.trial_id for t in trials}) == 5
    assert all(t.train.steps == 100 for t in trials)
    assert space.trial_count(sweep()) == 5


def test_shared_sparse_settings_count_only_for_methods_that_have_them() -> None:
    s = sweep(base=BASE | {"sparse": {"allocation": "uniform", "update_interval": 7}})
    dense, static, *_, rigl = [space.trial(s, point).sparse for point in space.grid_points(s)]
    assert dense.allocation is None
    assert (static.allocation, static.update_interval) == ("uniform", None)
    assert (rigl.allocation, rigl.update_interval) == ("uniform", 5)


def test_a_seed_makes_another_trial_of_the_same_point() -> None:
    point = {"method": "static", "sparsity": 0.5}
    first, second = space.trial(sweep(), point), space.trial(sweep(), point, seed=3)
    assert second.seed == 3
    assert first.trial_id != second.trial_id


def test_dotted_axes_reach_any_setting() -> None:
    s = sweep(grid={"dense": {"optimizer.lr": [1e-3, 4e-3], "data.options.representation": ["del"]}})
    trials = [space.trial(s, point) for point in space.grid_points(s)]
    assert [t.optimizer.lr for t in trials] == [1e-3, 4e-3]
    assert trials[0].data.options == {"representation": "del"}


@pytest.mark.parametrize(
    ("axis", "values", "words"),
    [
        ("evaluate.extractor", ["glyph_cnn", "oriented_energy"], "FIDs of different protocols"),
        ("evaluate.ddim_steps", [10, 50], "raysparse evaluate"),
        ("evaluate.guidance", [None, 2.0], "FIDs of different protocols"),
        ("evaluate.every_steps", [5, 10], "compared at the same steps"),
        ("data.name", ["hershey", "kanjivg"], "other reference images"),
        ("data.options", [{"spacing": 0.1}], "other reference images"),
        ("data.options.spacing", [0.05, 0.1], "other reference images"),
    ],
)
def test_what_makes_fids_that_do_not_compare_is_no_axis(axis: str, values: list[Any], words: str) -> None:
    for walk in (
        {"grid": {"rigl": {axis: values}}},
        {"grid": None, "search": {"trials": 1, "axes": {"rigl": {axis: values}}}},
    ):
        with pytest.raises(UsageError, match=f"{axis} is not an axis: .*{words}"):
            sweep(**walk)
    assert sweep(grid={"rigl": {"evaluate.precision": ["fp32", "bf16"], "data.train_examples": [64, None]}})


def test_the_digest_is_of_what_is_computed() -> None:
    assert sweep().digest == sweep(base=BASE | {"data": {"source": "/somewhere"}}).digest
    assert sweep().digest != sweep(confirm={"seeds": [1, 2]}).digest
    again = space.parse(sweep().model_dump(mode="json"), "sweep.json")
    assert again == sweep()
    assert again.digest == sweep().digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"girds": {}}, ["unknown key 'girds'", "did you mean 'grid'"]),
        ({"search": {"trials": 1, "axes": {"dense": {}}}}, ["either `grid:` or `search:`"]),
        ({"grid": None}, ["either `grid:` or `search:`"]),
        ({"grid": {}}, ["no method"]),
        ({"grid": {"rigel": {}}}, ["unknown method 'rigel'", "did you mean 'rigl'"]),
        ({"grid": {"dense": {"sparsity": [0.5]}}}, ["'dense' has no axis 'sparsity'"]),
        ({"grid": {"static": {"sparsity": [0.5], "prune_ratio": [0.1]}}}, ["'static' has no axis 'prune_ratio'"]),
        ({"grid": {"axes": {"static": {"sparsity": [0.5]}}}}, ["unknown method 'axes'", "known: "]),
        ({"grid": {"static": {"sparcity": [0.5]}}}, ["unknown axis 'sparcity'", "did you mean 'sparsity'"]),
        ({"grid": {"static": {"sparsity": [0.5, 1.2]}}}, ["[0, 1)", "1.2"]),
        ({"grid": {"static": {"sparsity": []}}}, ["static.sparsity has no values"]),
        ({"grid": {"static": {"sparsity": {"low": 0.1, "high": 0.9}}}}, ["a grid takes a list", "search"]),
        ({"grid": {"dense": {"seed": [1, 2]}}}, ["seed"]),
        ({"grid": {"dense": {"train.steps": [1, 2]}}}, ["train.steps is not an axis"]),
        ({"grid": {"dense": {"train.runtime": ["auto", "dense"]}}}, ["train.runtime is not an axis: it says where or"]),
        ({"grid": {"dense": {"train.threads": [1, 2]}}}, ["train.threads is not an axis"]),
        ({"grid": {"dense": {"optimizer.learning": [1]}}}, ["unknown key 'learning'"]),
        (
            {"grid": {"dense": {"train.batch_size": [64, 63]}}, "resources": {"workers": 2}},
            ["train.batch_size 63 cannot be shared by 2 workers x 1", "multiple of 2"],
        ),
        (
            {"base": BASE | {"train": {"steps": 100, "cuda_graph": True}}, "resources": {"workers": 2}},
            ["train.cuda_graph is for one worker, but resources.workers is 2"],
        ),
        ({"base": {"train": {"stepz": 1}}}, ["did you mean 'steps'"]),
        ({"base": BASE | {"sparse": {"method": "rigl"}}}, ["base.sparse", "unknown key 'method'"]),
        ({"base": BASE | {"sparse": 3}}, ["base.sparse must be a mapping"]),
        ({"base": BASE | {"sparse": {1: 2}}}, ["base.sparse: unknown key 1; known: allocation"]),
        ({"asha": {"grace_steps": 100}}, ["not below train.steps 100"]),
        ({"asha": {"grace_steps": 15}}, ["not a multiple of evaluate.every_steps 10"]),
        ({"asha": {"rungs": [10, 100]}}, ["asha.rungs 100 is not below train.steps 100"]),
        ({"asha": {"rungs": [10, 25]}}, ["asha.rungs 25 is not a multiple of evaluate.every_steps 10"]),
        ({"asha": {"rungs": [20, 10]}}, ["each above the one before, got [20, 10]"]),
        ({"asha": {"rungs": [0, 10]}}, ["steps from 1 on"]),
        ({"asha": {"rungs": [10], "grace_steps": 10}}, ["either grace_steps, the first rung, or rungs"]),
        ({"asha": {"reduction_factor": 2}}, ["either grace_steps, the first rung, or rungs"]),
        ({"asha": {"grace_steps": 10, "explore_first": True}}, ["give second_chances as well"]),
        ({"asha": {"grace_steps": 10, "reduction_factor": 1}}, ["reduction_factor", "1"]),
        ({"asha": {"grace": 10}}, ["unknown key 'grace'", "did you mean 'grace_steps'"]),
        ({"asha": {"grace_steps": 10, "reduction_factor": True}}, ["asha.reduction_factor", "got True"]),
        ({"resources": {"workers": True}}, ["resources.workers", "got True"]),
        ({"grid": {"static": {"sparsity": [False]}}}, ["sparsity", "got False"]),
        ({"grid": {"dense": {"optimizer.lr": [True]}}}, ["optimizer.lr", "got True"]),
        (
            {"grid": None, "search": {"trials": 1, "axes": {"static": {"sparsity": {"low": False, "high": 0.5}}}}},
            ["sparsity", "got False"],
        ),
        ({"confirm": {"seeds": [1, 1]}}, ["seeds must differ"]),
        ({"confirm": {"seeds": [0, 1]}}, ["the search's own seed 0"]),
        ({"confirm": {"seeds": []}}, ["seeds"]),
        ({"confirm": {"seeds": [-1]}}, ["confirm.seeds.0: got -1", "greater than or equal to 0"]),
        ({"confirm": {"seeds": [2**63]}}, ["confirm.seeds.0: got 9223372036854775808"]),
        ({"confirm": {"seeds": list(range(1, 1002))}}, ["confirm.seeds", "at most 1000"]),
        ({"confirm": {"seeds": [1], "best_per_method": 100_001}}, ["confirm.best_per_method", "to 100000"]),
        ({"confirm": {"seeds": [1], "front": 100_001}}, ["confirm.front", "equal to 100000"]),
        ({"asha": {"grace_steps": 10, "second_chances": 100_001}}, ["asha.second_chances", "equal to 100000"]),
        (
            {"grid": {"rigl": {name: [i / 100 for i in range(1, 100)] for name in FOUR}}},
            ["the grid has 96,059,601 combinations, at most 100,000; use `search:`"],
        ),
        ({"resources": {"workers": 3}}, ["batch_size 128", "3 workers"]),
        ({"resources": {"gpus_per_worker": 1.5}}, ["gpus_per_worker above 1 must be a whole number", "1.5"]),
        ({"resources": {"gpus_per_worker": 1e-5}}, ["at least 0.0001", "1e-05"]),
        ({"resources": {"workers": 2, "gpus_per_worker": 0.5}}, ["2 workers cannot share a GPU", "workers: 1"]),
        ({"name": "../up"}, ["name", "../up"]),
        (
            {"grid": {"rigl": {"train.batch_size": [96, 128], "train.accumulate": [1, 64]}}},
            ["'train.batch_size': 96, 'train.accumulate': 64}", "96 is not a multiple of accumulate 64"],
        ),
    ],
)
def test_a_bad_file_is_refused_with_the_place_and_the_rule(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        sweep(**changes)
    for word in words:
        assert word in str(caught.value)


def search(**changes: Any) -> space.Sweep:
    axes = {"dense": {}, "rigl": {"sparsity": [0.5, 0.9], "prune_ratio": {"low": 0.05, "high": 0.5, "log": True}}}
    base = BASE | {"train": {"steps": 100, "accumulate": 2}}
    return sweep(base=base, grid=None, search={"trials": 8, "axes": axes} | changes)


def test_a_search_takes_ranges_and_seed_points() -> None:
    search(axes={"dense": {"train.batch_size": {"low": 32, "high": 127, "step": 32}}})
    s = search(seed_points=[{"method": "rigl", "sparsity": 0.5, "prune_ratio": 0.1}, {"method": "dense"}])
    assert space.trial_count(s) == 8
    assert s.search is not None
    assert space.trial(s, dict(s.search.seed_points[0])).sparse.prune_ratio == 0.1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed_points": [{"method": "rigl", "sparsity": 0.7}]}, ["outside its axis", "0.7"]),
        ({"seed_points": [{"method": "rigl", "prune_ratio": 0.9}]}, ["outside its axis", "0.9"]),
        ({"seed_points": [{"method": "rigl", "prune_ratio": "0.1"}]}, ["outside its axis", "'0.1'"]),
        ({"seed_points": [{"method": "rigl", "prune_ratio": None}]}, ["outside its axis", "None"]),
        ({"seed_points": [{"method": ["rigl"]}]}, ["method must be one of dense, rigl, got ['rigl']"]),
        ({"seed_points": [{"sparsity": 0.5}]}, ["method must be one of dense, rigl"]),
        ({"seed_points": [{"method": "dense", "sparsity": 0.5}]}, ["unknown axis 'sparsity'"]),
        ({"axes": {"rigl": {"sparsity": {"low": 0.9, "high": 0.1}}}}, ["low must be below high"]),
        ({"axes": {"rigl": {"prune_ratio": {"low": 0, "high": 0.1, "log": True}}}}, ["log needs low > 0"]),
        ({"axes": {"rigl": {"sparsity": {"low": 0.5, "high": 1.5}}}}, ["[0, 1)"]),
        ({"axes": {"rigl": {"sparsity": {"low": 0.5, "hig": 0.9}}}}, ["did you mean 'high'"]),
        ({"axes": {"rigl": {"update_interval": {"low": 5, "high": 9, "step": 0.5}}}}, ["takes whole numbers", "0.5"]),
        ({"axes": {"dense": {"optimizer.warmup_steps": {"low": 0.5, "high": 9}}}}, ["takes whole numbers", "0.5"]),
        ({"axes": {"dense": {"sparse.sparsity": {"low": 0.5, "high": 0.9}}}}, ["method 'dense' has no 'sparsity'"]),
        ({"axes": {"rigl": {"sparsity": 0.5}}}, ["search.axes.rigl.sparsity: ", "a list of values such as", "got 0.5"]),
        (
            {"axes": {"dense": {"train.batch_size": {"low": 32, "high": 128}}}},
            ["33 is not a multiple of accumulate 2", "a fitting step"],
        ),
        ({"sampler": "gp"}, ["sampler", "gp"]),
        ({"trials": 0}, ["trials", "0"]),
        ({"trials": 100_001}, ["search.trials: got 100001", "equal to 100000"]),
        ({"seed": 2**63}, ["search.seed", "got 9223372036854775808"]),
        ({"samples": 3}, ["unknown key 'samples'", "search"]),
    ],
)
def test_a_bad_search_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        search(**changes)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)  # one mistake, one complaint


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nname: b\n", "stands twice"),
        ("- a\n- b\n", "must be a mapping"),
        ("a: [1\n", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("", "must be a mapping"),
        ("1: 2\n", "must be a mapping of names such as `name: ...`, got the key 1"),
        (
            "grid: {static: {sparsity: [0.5, 0.9, 0.5]}}",
            "got [0.5, 0.9, 0.5]; leave out the second 0.5",
        ),
        ("grid: {dense: {optimizer.weight_decay: [1, 1.0]}}", "values must differ, got [1, 1.0]"),
        ("grid: {dense: {optimizer.betas: [[0.9, 0.99], [0.9, 0.99]]}}", "values must differ"),
        ("search: {trials: 1, axes: {static: {sparsity: [0.5, 0.5]}}}", "static.sparsity: values must differ"),
    ],
)
def test_yaml_that_is_no_sweep_names_the_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"bad\.yaml") as caught:
        space.load(path)
    assert words in str(caught.value)
    with pytest.raises(UsageError, match="cannot read"):
        space.load(tmp_path / "absent.yaml")


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.e-3", ".1e-2", "+1.0e-3", "0.001"])
def test_a_number_is_one_however_it_is_written(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lr.yaml"
    point = f"{{method: set, optimizer.lr: {text}, optimizer.weight_decay: {text}}}"
    axes = f"{{optimizer.lr: [{text}, 1e1], optimizer.weight_decay: {{low: 1e-4, high: 1e-2}}}}"
    path.write_text(f"search: {{trials: 4, axes: {{set: {axes}}}, seed_points: [{point}]}}\n")
    found = space.load(path)
    assert found.axes["set"]["optimizer.lr"] == (0.001, 10)
    assert found.search
    assert found.search.seed_points == ({"method": "set", "optimizer.lr": 0.001, "optimizer.weight_decay": 0.001},)
    assert cli.parse_changes([f"optimizer.lr={text}"]) == {"optimizer.lr": 0.001}


@pytest.mark.parametrize("text", ["e3", "1e", "1e-", "a1e3", "1e3b", "1-e3", "1.1.1e3"])
def test_text_with_numbers_stays_text(text: str) -> None:
    assert space.read_yaml(text) == text


def test_overrides_reach_into_the_file_before_it_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("grid: {dense: {}}\nbase: {train: {steps: 50}}\n")
    loaded = space.load(path, {"base.train.steps": 70})
    assert loaded.name == "mine"
    assert space.parsed_base(loaded).train.steps == 70
    with pytest.raises(UsageError, match="did you mean 'steps'"):
        space.load(path, {"base.train.stepz": 70})


def test_a_method_with_nothing_behind_it_has_no_axes(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    for walk in ("grid: {dense: , set: }", "search: {trials: 2, axes: {dense: , set: }}"):
        path.write_text(walk)
        plain = path.with_name("plain.yaml")
        plain.write_text(walk.replace(": ,", ": {},").replace("set: }", "set: {}}"))
        assert space.load(path, {"name": "s"}).digest == space.load(plain, {"name": "s"}).digest


def test_a_grid_without_the_dense_baseline_gets_it() -> None:
    points = space.grid_points(sweep(grid={"static": {"sparsity": [0.5]}}))
    assert points == [{"method": "dense"}, {"method": "static", "sparsity": 0.5}]
