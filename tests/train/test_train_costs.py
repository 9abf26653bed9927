"""What a trial costs, by its settings alone."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from raysparse.metrics import flops
from raysparse.models import chirodiff
from raysparse.train import setup


def test_flops_ratio_of_chirodiff_is_the_density(tiny):
    # Every weight is used once per point (PAPER: cost accounting), so the allocation does not matter.
    for allocation in ("er", "uniform"):
        static = {"sparse.method": "static", "sparse.sparsity": 0.75, "sparse.allocation": allocation}
        cost = setup.estimate(tiny(static))
        for convention in (flops.TRUE, cost.paper):
            ratio = cost.inference(convention) / cost.inference(convention, dense=True)
            assert ratio == pytest.approx(0.25, abs=2e-3)
        assert cost.train(flops.TRUE, 12) / cost.train(flops.TRUE, 12, dense=True) == pytest.approx(0.25, abs=2e-3)


def test_flops_by_hand(tiny):
    cost = setup.estimate(tiny(), mean_points=10)
    per_point = sum(cost.macs.values()) / 10
    assert per_point == int(per_point)
    assert cost.inference(flops.TRUE) == 2 * per_point * 10 * 3  # 3 DDIM steps
    assert cost.spent(5) == (3 * 4 * per_point * 10 * 5, 3 * 2 * per_point * 10 * 5 * 16)  # paper: no batch factor


def test_a_sketch_that_runs_counts_what_shapes_alone_count(tiny):
    cost = setup.estimate(tiny(), mean_points=9.5)
    options = setup.model_options(tiny())
    with torch.device("meta"):
        model = chirodiff.build(options, seed=0)
    macs = flops.forward_macs(model, chirodiff.example(options, 1, 10, device="meta"), batch=1)
    assert cost.macs.keys() == macs.keys()
    assert all(math.isclose(cost.macs[name], count * 0.95) for name, count in macs.items())


def test_the_costs_of_sketches_do_not_import_pytorchs_compiler():
    check = (
        "import sys; from raysparse import config; from raysparse.train import setup;"
        "setup.estimate(config.parse({})); sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", check], check=True, timeout=120)


def test_dense_gradients_cost_until_updates_end(tiny, rigl):
    whole, half, magran = (
        setup.estimate(tiny(rigl, change))
        for change in ({}, {"sparse.update_end_fraction": 0.5}, {"sparse.method": "magran"})
    )
    spent = [cost.spent(12)[1] for cost in (magran, half, whole)]
    assert spent == sorted(set(spent))
    assert half.spent(5) == whole.spent(5)
    assert half.spent(6)[1] < whole.spent(6)[1]  # no update at the end
    assert [whole.spent(step)[1] for step in (0, 12)] == [0, whole.train(flops.TRUE, 12)]
    # ΔTe = 3, of 12 steps: updates at 3, 6 and 9.
    assert spent[2] / magran.train(flops.TRUE, 12, dense=True) == pytest.approx(flops.rigl_share(0.5, 4), abs=2e-3)


@pytest.mark.parametrize("interval", [1, 2, 5])
def test_the_dense_gradients_of_the_true_figure_are_those_of_the_loop(tiny, rigl, interval):
    trial = tiny(rigl, {"sparse.update_interval": interval})
    trainer = setup.build(trial)
    list(trainer.run())
    count = trainer.engine.updates
    assert count == 11 // interval
    cost = setup.estimate(trial)
    r = cost.inference(flops.TRUE) / cost.inference(flops.TRUE, dense=True)
    dense = cost.train(flops.TRUE, 12, dense=True)
    assert cost.train(flops.TRUE, 12) == pytest.approx(dense * (r * (12 - count) + count * (2 * r + 1) / 3) / 12)
    assert cost.spent(12, count) == cost.spent(12)


def test_facts_carry_protocol_versions_and_the_trial(tiny, rigl):
    trial = tiny(rigl)
    facts = setup.facts(trial, sweep="s", stage="search", world_size=2, command="c")
    assert (facts.trial_id, facts.method, facts.sparsity, facts.total_steps) == (trial.trial_id, "rigl", 0.5, 12)
    assert '"generated":24' in facts.protocol
    assert '"kid_subset_size":16' in facts.protocol
    assert '"torch"' in facts.versions
    assert facts.params_active < facts.params_total
    assert facts.defaults == '{"sparse.interval_schedule": "constant", "sparse.pattern": "element"}'


def test_a_sample_costs_the_steps_that_are_done(tiny):
    hundred = setup.estimate(tiny({"evaluate.ddim_steps": 100, "evaluate.timestep_spacing": "original"}))
    more = setup.estimate(tiny({"evaluate.ddim_steps": 150, "evaluate.timestep_spacing": "original"}))
    assert more.inference(flops.TRUE) / hundred.inference(flops.TRUE) == pytest.approx(1.67)
