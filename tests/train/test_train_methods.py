"""Methods, patterns and schedules beside the papers' through a whole Trainer: resumed bit for bit, saved exactly."""

from __future__ import annotations

import itertools

import pytest
import torch
from trainer_state import assert_same, computed, everything, tensors_of

from raysparse.metrics import flops
from raysparse.results import read_trial
from raysparse.train import run, setup, state

SETTINGS = {
    "momentum on diagonals": {"method": "momentum", "pattern": "diagonal", "gradient_momentum": 0.5},
    "mixed N:M": {"method": "mixed", "pattern": "nm"},
    "stall": {"method": "set", "prune_schedule": "stall", "interval_schedule": "stall", "stall_reports": 1},
    "linear": {"method": "rigl", "interval_schedule": "linear", "update_interval_end": 5, "prune_schedule": "linear"},
    "nm_ste": {"method": "nm_ste", "stages": "3:4", "stage_steps": 5},
    "timesteps": {"method": "timesteps", "ranges": "0-300:0.5,300-1000:0.75"},
}


def changes_of(name):
    settings = name if isinstance(name, dict) else SETTINGS[name]
    own = {} if settings["method"] in ("nm_ste", "timesteps") else {"update_interval": 3}
    return {f"sparse.{key}": value for key, value in {**own, **settings}.items()}


@pytest.mark.parametrize("name", SETTINGS)
def test_resume_is_bit_exact(tiny, tmp_path, name):
    trial = tiny(changes_of(name))
    straight = setup.build(trial)
    expected = [computed(report) for report in straight.run()]
    assert straight.engine.updates > 1 or name == "timesteps"

    first = setup.build(trial)
    seen = [computed(report) for report in itertools.islice(first.run(), 1)]
    first.should_stop = lambda: first.step >= 7
    seen += [computed(report) for report in first.run()]
    assert first.step == 7
    state.save(first, tmp_path / "checkpoint")

    second = setup.build(trial)
    state.load(second, tmp_path / "checkpoint")
    seen += [computed(report) for report in second.run()]
    assert seen == expected
    assert second.engine.state_dict().get("clock") == straight.engine.state_dict().get("clock")
    assert_same(everything(straight, tmp_path / "a"), everything(second, tmp_path / "b"))


def test_a_fid_that_stalls_halves_the_interval(tiny, monkeypatch):
    trainer = setup.build(tiny(changes_of("stall"), {"train.steps": 12, "evaluate.every_steps": 4}))
    evaluate = trainer.evaluator.evaluate
    fids = iter([5.0, 5.0, 5.0])

    def with_fid(*arguments):
        found = evaluate(*arguments)
        object.__setattr__(found, "fid", next(fids))
        return found

    monkeypatch.setattr(trainer.evaluator, "evaluate", with_fid)
    assert len(list(trainer.run())) == 3
    assert trainer.engine.state_dict()["clock"] == {"stalls": 2, "best": 5.0, "since": 0, "last": 11}
    assert trainer.engine.updates == 4  # at 3 and 6; by twos after the stall at 8, at once at 9, and at 11


@pytest.fixture
def dense(tiny, tmp_path):
    """A results folder with a dense trial."""
    run.train(tiny(), tmp_path / "dense", device="cpu")
    return tmp_path / "dense"


def test_it_starts_from_the_teacher_and_learns_from_it(tiny, dense):
    from raysparse.train import restored

    teacher = {"sparse.teacher": str(dense), "sparse.start": "teacher"}
    trainer = setup.build(tiny(changes_of({"method": "nm_ste"}), teacher))
    theirs = restored.load(dense).model
    for name, weight in trainer.model.named_parameters():
        mask = trainer.engine.masks.get(name, torch.ones_like(weight, dtype=torch.bool))
        assert torch.equal(weight.detach(), theirs.get_parameter(name) * mask)
    losses = {}
    for loss, weight in (("noise", None), ("teacher", None), ("both", 0.1), ("both", 10.0)):
        changed = {"sparse.loss": loss, "train.steps": 2, "evaluate.every_steps": 2, "sparse.teacher_weight": weight}
        built = setup.build(tiny(changes_of({"method": "nm_ste"}), teacher, changed))
        losses[loss, weight] = float(built._train_step())
        assert all(not p.requires_grad for p in (built.teacher._model.parameters() if built.teacher else []))
    noise, taught = losses["noise", None], losses["teacher", None]
    assert 0 < taught < noise  # it begins as the teacher with half of its weights
    assert losses["both", 0.1] == pytest.approx(noise + 0.1 * taught, rel=1e-5)
    assert losses["both", 10.0] == pytest.approx(noise + 10 * taught, rel=1e-5)


def test_a_taught_trial_resumes_and_its_files_are_exact(tiny, dense, tmp_path):
    changes = {
        "sparse.teacher": str(dense),
        "sparse.loss": "both",
        "sparse.teacher_bf16": True,
        "sparse.start": "teacher",
    }
    trial = tiny(changes_of({"method": "nm_ste"}), changes, {"train.precision": "bf16"})
    assert run.train(trial, tmp_path / "out", device="cpu").state == "COMPLETED"
    (folder,) = (tmp_path / "out" / "checkpoints" / trial.trial_id).glob("step-000000012")
    found = tensors_of(folder)
    checked = 0
    for name in setup.build(trial).engine.masks:
        for part in ("weights", "ema"):
            tensor = found[f"{part}/{part}.{name}"]
            if tensor.shape[1] % 4 == 0:
                assert (tensor.reshape(-1, 4).count_nonzero(1) == 2).all(), (part, name)
                checked += 1
    assert checked == 8
    table = read_trial(tmp_path / "out" / "records" / f"{trial.trial_id}.parquet")
    assert table["sparsity"][0].as_py() == 0.5
    assert table["allocation"][0].as_py() == "uniform"


def test_what_it_costs(tiny, dense):
    cost = setup.estimate(tiny(changes_of({"method": "nm_ste"})))
    taught = setup.estimate(tiny(changes_of({"method": "nm_ste", "loss": "both", "teacher": str(dense)})))
    for name, density in cost.densities.items():
        assert density == (1.0 if "weight_ih_l0" in name else 0.5)
    assert set(cost.stays_dense) == {"gru.weight_ih_l0", "gru.weight_ih_l0_reverse"}  # 13 inputs
    ratio = cost.inference(flops.TRUE) / cost.inference(flops.TRUE, dense=True)
    whole = cost.train(flops.TRUE, 12, dense=True)
    assert cost.train(flops.TRUE, 12) == pytest.approx(whole * (2 * ratio + 1) / 3)
    assert taught.train(flops.TRUE, 12) == pytest.approx(whole * (2 * ratio + 2) / 3)
    staged = setup.estimate(tiny(changes_of("nm_ste")))
    assert staged.inference(flops.TRUE) == cost.inference(flops.TRUE)
    assert staged.train(flops.TRUE, 5) > cost.train(flops.TRUE, 5)
    more = staged.train(flops.TRUE, 12) - cost.train(flops.TRUE, 12)
    assert more == pytest.approx(staged.train(flops.TRUE, 5) - cost.train(flops.TRUE, 5))


def test_a_schedule_of_the_interval_costs_its_own_dense_gradients(tiny):
    cost = setup.estimate(tiny(changes_of("linear")))
    trainer = setup.build(tiny(changes_of("linear")))
    list(trainer.run())
    assert cost.schedule.updates(12) == trainer.engine.updates
    assert cost.spent(12) == cost.spent(12, trainer.engine.updates)
    assert cost.spent(12, 1)[1] < cost.spent(12, 4)[1]


def test_momentum_pays_for_its_window(tiny):
    rigl, momentum = (
        setup.estimate(tiny({"sparse.method": method, "sparse.update_interval": 3})) for method in ("rigl", "momentum")
    )
    assert rigl.spent(12)[1] < momentum.spent(12)[1] < rigl.train(flops.TRUE, 12, dense=True)


def test_masks_by_timestep_are_sampled_with_and_cost_what_they_use(tiny, tmp_path):
    from raysparse.train import restored

    trial = tiny(changes_of({"method": "timesteps", "ranges": "0-400:0.5,400-1000:0.75"}), {"evaluate.ddim_steps": 10})
    cost = setup.estimate(trial)
    dense = cost.inference(flops.TRUE, dense=True)
    assert cost.inference(flops.TRUE) / dense == pytest.approx(0.4 * 0.5 + 0.6 * 0.25, abs=2e-3)  # t = 0, 100, ..., 900
    whole = cost.train(flops.TRUE, 12, dense=True)
    assert cost.train(flops.TRUE, 12) / whole == pytest.approx(0.4 * 0.5 + 0.6 * 0.25, abs=2e-3)
    run.train(trial, tmp_path, device="cpu")
    model = restored.load(tmp_path)
    assert model.network is not model.model
    assert [sum(int(mask.sum()) for mask in own.values()) for own in model.network.masks] == [
        round(share * sum(mask.numel() for mask in model.masks.values())) for share in (0.5, 0.25)
    ]
    facts = read_trial(tmp_path / "records" / f"{trial.trial_id}.parquet")
    active = facts["params_total"][0].as_py() - sum(int((~mask).sum()) for mask in model.masks.values())
    assert facts["params_active"][0].as_py() == active


def test_ranges_cover_the_trials_timesteps(tiny, pictures):
    from raysparse.errors import UsageError

    for of, changes, message in (
        (tiny, {"sparse.ranges": "0-400:0.5,400-900:0.5"}, "end at 900, but diffusion.timesteps is 1000"),
        (pictures, {"train.compile": True}, "train.compile is true, but a mask per range"),
        (tiny, {"train.cuda_graph": True}, "train.cuda_graph is true, but a mask per range"),
    ):
        with pytest.raises(UsageError, match=message):
            setup.check(of({"sparse.method": "timesteps", **changes}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["momentum on diagonals", "nm_ste", "timesteps"])
def test_two_workers_train_as_one_does(tiny, tmp_path, name):
    plain = {"optimizer.name": "sgd", "optimizer.lr": 0.1, "optimizer.clip_norm": None, "train.steps": 4}
    stages = {"sparse.stage_steps": 2} if name == "nm_ste" else {}
    trial = tiny(changes_of(name), plain, stages)
    losses = []
    for workers in (1, 2):
        reports = []
        run.train(trial, tmp_path / str(workers), workers=workers, device="cpu", on_report=reports.append)
        losses.append((reports[-1].train_loss, reports[-1].validation_loss, reports[-1].density))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
