"""The training step, its averages, how trials go wrong, and what a Report holds."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import get_args, get_type_hints

import pytest
import torch

from raysparse import results
from raysparse.config import OptimizerConfig
from raysparse.results import Outcome, Report
from raysparse.train import setup
from raysparse.train.ema import Ema
from raysparse.train.loop import DIVERGED_LOSS
from raysparse.train.lr import learning_rate

# Adam's step does not depend on a gradient's size, so it blows rounding up: SGD where sums are compared.
SGD = {"optimizer.name": "sgd", "optimizer.lr": 0.1, "optimizer.clip_norm": None}


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def test_accumulation_equals_the_big_batch(tiny):
    whole, parts = (setup.build(tiny(SGD, {"train.accumulate": n, "train.steps": 3})) for n in (1, 4))
    start = weights(whole)
    (one,), (four,) = list(whole.run()), list(parts.run())
    assert one.train_loss == pytest.approx(four.train_loss, rel=1e-5)
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(parts)[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(value, start[name]), name


def test_loss_falls(tiny):
    trial = tiny({"train.steps": 150, "evaluate.every_steps": 50, "optimizer.lr": 0.01, "optimizer.clip_norm": 1.0})
    first, _, last = setup.build(trial).run()
    assert last.train_loss < 0.9 * first.train_loss
    assert last.validation_loss < 0.9 * first.validation_loss


def test_two_trials_with_one_seed_are_the_same_and_another_seed_is_not(tiny):
    a, b, c = (setup.build(tiny({"seed": seed})) for seed in (0, 0, 1))
    reports = [[report.train_loss for report in trainer.run()] for trainer in (a, b, c)]
    assert reports[0] == reports[1]
    assert reports[0] != reports[2]


def test_ema_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    ema = Ema(model, decay=0.5)
    model.weight.data.fill_(3.0)
    ema.update(1)  # decay min(.5, 2 / 11)
    assert ema.parameters()["weight"].item() == pytest.approx(3 - 2 * 2 / 11)
    ema.update(1000)  # decay .5
    assert ema.parameters()["weight"].item() == pytest.approx(3 - 2 / 11)
    assert model.weight.item() == 3.0
    with pytest.raises(ValueError, match="decay"):
        Ema(model, 1.0)


def test_averaged_weights_are_masked_whenever_used(tiny, rigl):
    trainer = setup.build(tiny(rigl))
    seen = []
    evaluate = trainer.evaluator.evaluate

    def spy(model, *rest):
        shadow = dict(model.named_parameters())
        for name, mask in trainer.engine.masks.items():
            assert torch.all(shadow[name][~mask] == 0), name
            assert torch.any(shadow[name][mask] != 0), name
        seen.append(trainer.step)
        return evaluate(model, *rest)

    trainer.evaluator.evaluate = spy
    assert [report.topology_updates for report in trainer.run()] == [1, 2, 3]
    assert seen == [4, 8, 12]


def test_a_report_is_complete_and_can_be_recorded(tiny, rigl, tmp_path):
    trial = tiny(rigl)
    trainer = setup.build(trial)
    reports = list(trainer.run())
    for report in reports:
        for name, hint in get_type_hints(Report).items():
            value = getattr(report, name)
            if name in ("reason", "intermediate_fid"):  # test_train_intermediate.py
                assert value is None
            else:
                assert isinstance(value, (get_args(hint) or (hint,))[0]), name
                assert not isinstance(value, float) or math.isfinite(value), name
        density = json.loads(report.layer_density)
        assert density.keys() == trainer.engine.masks.keys()
        assert report.density == pytest.approx(0.5, abs=1e-3)
        assert 0 < report.topology_changed <= 1
        assert report.samples_png.startswith(b"\x89PNG")
    assert [report.step for report in reports] == [4, 8, 12]
    for name in ("train_s", "evaluate_s", "flops_spent_paper", "flops_spent_true"):
        values = [getattr(report, name) for report in reports]
        assert values == sorted(set(values)), name
    facts = setup.facts(trial, sweep="s", stage="single", world_size=1, command="raysparse train")
    path = results.write_trial(tmp_path, facts, Outcome("COMPLETED"), reports)
    assert results.reports_of(results.read_trial(path)) == reports
    assert facts.flops_train_true == pytest.approx(reports[-1].flops_spent_true)
    active = facts.params_total - sum(int((~mask).sum()) for mask in trainer.engine.masks.values())
    assert facts.params_active == active


def test_dense_reports_no_topology(tiny):
    report = next(setup.build(tiny()).run())
    assert (report.density, report.layer_density, report.topology_updates, report.topology_changed) == (1, "{}", 0, 0)


def test_a_loss_that_is_not_a_number_ends_the_trial_with_a_reason(tiny):
    # Weight decay times a huge rate multiplies the weights by -1e35 at once: the next loss overflows.
    wild = {"optimizer.lr": 1e35, "optimizer.weight_decay": 1.0, "optimizer.clip_norm": None, "train.steps": 40}
    trainer = setup.build(tiny(wild, {"optimizer.name": "sgd", "evaluate.every_steps": 20}))
    (report,) = trainer.run()
    assert report.diverged
    assert report.reason in {f"loss became {value} at step {step}" for value in ("inf", "nan") for step in (2, 3)}
    assert (report.train_loss, report.validation_loss, report.fid, report.samples_png) == (None,) * 4
    assert report.step <= 3
    assert list(trainer.run()) == []


def test_an_exploding_loss_ends_the_trial_with_a_reason(tiny):
    wild = {"optimizer.lr": 300.0, "optimizer.clip_norm": 1.0, "optimizer.weight_decay": 0.0}
    (report,) = setup.build(tiny(SGD, wild)).run()
    assert report.diverged
    assert report.step == 4
    assert f"is above {DIVERGED_LOSS:g}" in report.reason


def test_bf16_trains_on_fp32_weights(tiny, rigl):
    trainer = setup.build(tiny(rigl, {"train.precision": "bf16"}))
    exact = setup.build(tiny(rigl))
    for a, b in zip(trainer.run(), exact.run(), strict=True):
        assert a.train_loss != b.train_loss
        assert a.train_loss == pytest.approx(b.train_loss, rel=0.05)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_learning_rate_is_a_function_of_the_step():
    plain = OptimizerConfig(lr=1.0)
    assert [learning_rate(plain, step, 10) for step in (0, 9)] == [1.0, 1.0]
    warm = OptimizerConfig(lr=1.0, warmup_steps=3)
    assert [learning_rate(warm, step, 10) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = OptimizerConfig(lr=2.0, warmup_steps=2, lr_schedule="cosine")
    assert [learning_rate(cosine, step, 10) for step in (2, 6, 10)] == pytest.approx([2.0, 1.0, 0.0])


def test_report_fields_are_those_of_the_schema():
    assert {field.name for field in dataclasses.fields(Report)} <= set(results.SCHEMA.names)
