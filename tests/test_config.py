"""Trial settings: what is refused, with which words; what an id depends on."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysparse import config, plugins
from raysparse.errors import UsageError


def test_defaults_are_a_dense_trial_without_sparse_settings() -> None:
    trial = config.parse({})
    assert trial.sparse.method == "dense"
    assert trial.sparse.sparsity is None
    assert trial.sparse.allocation is None


def test_a_method_gets_the_papers_values_where_the_file_says_nothing() -> None:
    rigl = config.parse({"sparse": {"method": "rigl"}}).sparse
    assert (rigl.sparsity, rigl.prune_ratio, rigl.update_interval, rigl.allocation) == (0.5, 0.5, 800, "erk")
    static = config.parse({"sparse": {"method": "static", "sparsity": 0.9}}).sparse
    assert static.prune_ratio is None
    assert static.update_interval is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"sparse": {"method": "rigl", "sparcity": 0.5}}, ["sparse", "sparcity", "did you mean 'sparsity'"]),
        ({"sparse": {"method": "rigl", 1: 2}}, ["sparse", "unknown key 1"]),
        ({"trian": {}}, ["unknown key 'trian'", "did you mean 'train'"]),
        ({"train": {"stpes": 3}}, ["train", "did you mean 'steps'"]),
        ({"sparse": {"method": "dense", "sparsity": 0.5}}, ["'dense' has no 'sparsity'", "0.5"]),
        ({"sparse": {"method": "static", "prune_ratio": 0.5}}, ["'static' has no 'prune_ratio'"]),
        ({"sparse": {"method": "static", "sparsity": 1.0}}, ["[0, 1)", "1.0"]),
        ({"sparse": {"method": "static", "sparsity": -0.1}}, ["[0, 1)", "-0.1"]),
        ({"sparse": {"method": "rigl", "prune_ratio": 0}}, ["(0, 1]", "0"]),
        ({"sparse": {"method": "rigl", "prune_ratio": 1.5}}, ["(0, 1]", "1.5"]),
        ({"sparse": {"method": "rigle"}}, ["unknown method 'rigle'", "did you mean 'rigl'"]),
        ({"sparse": {"method": "rigl", "update_interval": 0}}, ["update_interval", "0"]),
        ({"sparse": {"method": ["rigl"]}}, ["method must be a name"]),
        ({"sparse": "rigl"}, ["sparse", "'rigl'"]),
        ({"optimizer": {"lr": float("nan")}}, ["lr", "nan"]),
        ({"seed": 2**63}, ["seed", str(2**63)]),  # more than a record holds
        ({"train": {"steps": 2**63}}, ["train.steps"]),
        ({"sparse": {"method": "rigl", "update_interval": 2**63}}, ["update_interval"]),
        ({"train": {"steps": True}}, ["train.steps", "got True", "yes", "give a number"]),  # YAML's yes
        ({"data": {"train_examples": True}}, ["data.train_examples", "got True"]),
        ({"optimizer": {"betas": [0.9, False]}}, ["optimizer.betas", "got False"]),
        ({"sparse": {"method": "rigl", "update_interval": True}}, ["update_interval", "got True"]),
        ({"evaluate": {"generated": 10**30}}, ["evaluate.generated", "10000000"]),
        ({"train": {"batch_size": 10**11}}, ["train.batch_size", "1000000"]),
        ({"train": {"batch_size": 10**11, "accumulate": 10**10}}, ["train.batch_size", "1000000"]),
        ({"evaluate": {"batch_size": 10**11}}, ["evaluate.batch_size", "1000000"]),
        ({"evaluate": {"kid_subsets": 10**30}}, ["evaluate.kid_subsets"]),
        ({"evaluate": {"grid": 10**30}}, ["evaluate.grid"]),
        ({"diffusion": {"timesteps": 10**30}}, ["diffusion.timesteps"]),
        ({"train": {"threads": 100_000}}, ["train.threads", "100000"]),
        ({"optimizer": {"betas": [0.9, 1.0]}}, ["optimizer.betas.1", "1.0", "less than 1"]),
        ({"optimizer": {"betas": [-1, 0.9]}}, ["optimizer.betas.0", "-1"]),
        ({"train": {"batch_size": 10, "accumulate": 3}}, ["batch_size 10", "accumulate 3"]),
    ],
)
def test_bad_settings_are_refused_with_the_value_the_rule_and_the_way_out(data: dict, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        config.parse(data, "trial.yaml")
    message = str(caught.value)
    assert message.startswith("trial.yaml")
    for word in words:
        assert word in message


def test_the_id_covers_what_is_computed_and_not_where() -> None:
    base = config.parse({})
    assert base.trial_id.startswith("dense-")
    for data in (
        {"seed": 1},
        {"train": {"steps": 7}},
        {"data": {"options": {"spacing": 0.1}}},
        {"sparse": {"method": "static"}},
        {"evaluate": {"precision": "fp32"}},  # whatever train.precision is: another way to say it is another trial
    ):
        assert config.parse(data).trial_id != base.trial_id
    for data in (
        {"data": {"source": "/elsewhere"}},
        {"data": {"root": "/r"}},
        {"evaluate": {"weights": "/w"}},
        {"train": {"threads": 2}},
    ):
        assert config.parse(data).trial_id == base.trial_id


def test_the_id_is_the_same_in_another_process() -> None:
    code = "from raysparse import config; print(config.parse({'seed': 5}).trial_id)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == config.parse({"seed": 5}).trial_id


def test_settings_and_sweep_files_need_neither_torch_nor_ray() -> None:
    code = (
        "import sys, raysparse.space, raysparse.results\n"
        "raysparse.space.config.parse({'sparse': {'method': 'rigl'}})\n"
        "assert not {'torch', 'ray', 'optuna'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@given(seed=st.integers(0, 2**31), lr=st.floats(1e-6, 1), method=st.sampled_from(plugins.names("methods")))
def test_json_brings_a_trial_back(seed: int, lr: float, method: str) -> None:
    trial = config.parse({"seed": seed, "optimizer": {"lr": lr}, "sparse": {"method": method}})
    again = config.parse(json.loads(trial.dump_json()))
    assert again == trial
    assert again.trial_id == trial.trial_id


def test_with_value_replaces_one_value_and_leaves_the_rest() -> None:
    data = {"train": {"steps": 5, "ema_decay": 0.5}}
    changed = config.with_value(data, "train.steps", 9)
    assert changed == {"train": {"steps": 9, "ema_decay": 0.5}}
    assert data["train"]["steps"] == 5
    assert config.with_value({}, "a.b.c", 1) == {"a": {"b": {"c": 1}}}
    with pytest.raises(UsageError, match="'steps' is a value"):
        config.with_value(data, "train.steps.more", 1)


def test_the_analysis_leaves_out_the_same_places() -> None:
    """It may import nothing of ours but the records, so it has its own list."""
    from analysis.load import PLACES

    assert set(PLACES) == {"seed", *(".".join(place) for place in config.PLACES)}


def test_the_analysis_knows_the_same_later_settings() -> None:
    from analysis.load import LATER

    assert {f"{section}.{name}": default for section, name, default in config.LATER} == LATER


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"evaluate": {"validation_examples": 512, "precision": "bf16", "intermediate": {"generated": 100}}},
        {"first_stage": {"weights": "/a"}, "train": {"threads": 2}},
        {"first_stage": {"weights": "/a", "sha256": "0" * 64}},
        {"sparse": {"method": "magran", "pattern": "block", "block": 8}},
    ],
)
def test_a_configuration_of_the_analysis_is_what_an_id_is_made_of(data: dict[str, Any]) -> None:
    from analysis.load import _flatten, _settings

    trial = config.parse(data)
    assert _settings(trial.dump_json()) == {k: v for k, v in _flatten(trial.content()).items() if k != "seed"}


@pytest.mark.parametrize(
    ("data", "left_out"),
    [
        ({}, {}),  # dense has no setting
        ({"method": "static"}, {"pattern": "element"}),
        ({"method": "static", "pattern": "block"}, {"block": 16, "other_layers": "element"}),
        ({"method": "static", "pattern": "block", "block": 16}, {"block": 16, "other_layers": "element"}),
        ({"method": "static", "pattern": "block", "block": 8}, {"other_layers": "element"}),
        ({"method": "static", "block": 8}, {"pattern": "element"}),  # by element, a block has no effect
        (
            {"method": "rigl", "prune_schedule": "cosine"},
            {"pattern": "element", "interval_schedule": "constant", "prune_ratio_end": 0.0},
        ),
    ],
)
def test_what_a_trial_leaves_out_is_at_its_default(data: dict[str, Any], left_out: dict[str, Any]) -> None:
    assert config.parse({"sparse": data}).sparse.left_out() == left_out


@pytest.mark.parametrize("method", plugins.names("methods"))
def test_a_trial_with_what_it_leaves_out_is_the_same_trial(method: str) -> None:
    trial = config.parse({"sparse": {"method": method}})
    whole = trial.sparse.model_dump(exclude_none=True) | trial.sparse.left_out()
    assert config.parse({"sparse": whole}).trial_id == trial.trial_id
    given = {"method": method} | {name: trial.sparse.setting(name) for name in config.method_settings(method)}
    assert {name for name in given if given[name] is not None} - set(whole) <= trial.sparse.settings().unused()
