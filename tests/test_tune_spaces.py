"""Every shipped sweep file can be read, its parts go together, and its numbers are the paper's."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from raysparse import config, space
from raysparse.config import TrialConfig
from raysparse.data import prepared
from raysparse.data.datasets import celeba_hq
from raysparse.train import checks, plan, setup

SPACES = Path(__file__).resolve().parents[1] / "tune_spaces"
SPARSITIES = (0.1, 0.25, 0.5, 0.75, 0.9)
LATENT = ("celeba_hq", "lsun_bedrooms", "imagenette", "imagenet", "imagenet_conditional")


def load(name: str) -> space.Sweep:
    return space.load(SPACES / f"{name}.yaml")


def base(name: str) -> TrialConfig:
    return space.parsed_base(load(name))


@pytest.mark.parametrize("path", sorted(SPACES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_parses_and_its_parts_go_together(path: Path) -> None:
    sweep = space.load(path)
    assert sweep.name == path.stem
    assert path.read_text().startswith("# "), "a head comment says what the file is for"
    points = sweep.search.seed_points if sweep.search else space.grid_points(sweep)
    assert {point["method"] for point in points} >= {"dense", "magran"}
    for point in points:
        checks.check_settings(space.trial(sweep, point))
    assert space.parsed_base(sweep).train.steps % space.parsed_base(sweep).evaluate.every_steps == 0


@pytest.mark.parametrize(
    ("name", "epochs", "steps", "lr", "eta"),
    [  # PAPER: Latent Diffusion; the learning rate and eta of ImageNet are not in it
        ("celeba_hq", 150, 156_300, 2.0e-6, 0.0),
        ("lsun_bedrooms", 150, 132_600, 2.4e-5, 1.0),
        ("imagenette", 150, 118_500, 2.4e-5, 1.0),
        ("imagenet", 150, 16_014_600, 2.4e-5, 1.0),
        ("imagenet_conditional", 50, 5_338_200, 2.4e-5, 1.0),
    ],
)
def test_latent_diffusion_has_the_papers_recipe(name: str, epochs: int, steps: int, lr: float, eta: float) -> None:
    trial = base(name)
    examples = prepared.check_options(trial.data.name, trial.data.options).train_examples  # type: ignore[attr-defined]
    examples = examples or celeba_hq.COUNTS["paper"][0]
    train, optimizer, evaluate = trial.train, trial.optimizer, trial.evaluate
    assert train.steps == steps == epochs * math.ceil(examples / train.batch_size)
    assert (train.batch_size, train.ema_decay, train.precision) == (12, 0.9999, "fp32")
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("adamw", lr, 1e-2)
    assert (optimizer.clip_norm, optimizer.lr_schedule, optimizer.warmup_steps) == (None, "constant", 0)
    assert tuple(trial.diffusion.model_dump().values()) == (1000, "scaled_linear", 0.0015, 0.0195)
    assert (evaluate.extractor, evaluate.generated, evaluate.ddim_steps, evaluate.eta) == (
        "inception",
        10_000,
        100,
        eta,
    )
    assert evaluate.timestep_spacing == "original"
    assert trial.first_stage is not None
    assert (trial.first_stage.name, trial.first_stage.options) == ("autoencoder", {})
    sparse = space.trial(load(name), {"method": "magran", "sparsity": 0.5, "prune_ratio": 0.5}).sparse
    assert (sparse.allocation, sparse.update_interval, sparse.prune_schedule) == ("erk", 1100, "constant")


def test_the_conditional_run_has_classes_and_guidance() -> None:
    trial = base("imagenet_conditional")
    assert trial.train.label_dropout == 0.1
    assert (trial.evaluate.guidance, trial.evaluate.eta) == (3.0, 1.0)
    assert checks.null_label(trial) == 1000
    assert setup.estimate(trial).params_total == 400_920_579 + 1001 * 512


@pytest.mark.parametrize("name", ["celeba_hq", "lsun_bedrooms", "imagenette"])
def test_the_studies_walk_the_papers_sparsities_and_prune_ratios(name: str) -> None:
    axes = load(name).axes
    assert axes["static"] == {"sparsity": SPARSITIES}
    ratios = (0.05, 0.1, 0.2, 0.3, 0.5) if name == "celeba_hq" else (0.05, 0.5)  # Figure 8 is of CelebA-HQ
    assert axes["magran"] == axes["rigl"] == {"sparsity": SPARSITIES, "prune_ratio": ratios}
    assert load(name).confirm.seeds == (1, 2, 3)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "printed"), [("celeba_hq", 9.0046e16), ("lsun_bedrooms", 7.6392e16), ("imagenette", 6.8269e16)]
)
def test_the_cost_of_a_run_is_the_one_that_the_paper_prints(name: str, printed: float) -> None:
    row = plan.cost_row(base(name))
    assert row["params_total"] == 274_056_163
    assert float(f"{row['flops_train_paper']:.4e}") == printed
    assert row["flops_inference_paper"] == pytest.approx(1.92036e13, rel=1e-5)


def test_the_evaluations_of_pictures_cost_what_comments_say() -> None:
    for name in ("celeba_hq", "lsun_bedrooms", "imagenette"):
        trial = base(name)
        row, evaluate, cheap = plan.cost_row(trial), trial.evaluate, trial.evaluate.intermediate
        assert cheap is not None
        full = evaluate.generated * row["flops_inference_true"] / row["flops_train_true"]
        early = full * cheap.generated / evaluate.generated * cheap.ddim_steps / evaluate.ddim_steps
        times = trial.train.steps // evaluate.every_steps
        of_all, of_these = (100 * cost / (1 + cost) for cost in (times * full, times * early + full))
        text = (SPACES / f"{name}.yaml").read_text()
        assert f"Evaluations are {of_these:.0f} % of a dense trial's FLOPs, {of_all:.0f} if all were full." in text
        if name == "celeba_hq":
            assert round(full, 2) == 0.18


def test_a_trial_of_two_workers_shares_a_batch() -> None:
    content = config.with_value(load("celeba_hq").model_dump(mode="json"), "resources.workers", 2)
    assert space.parse(content, "two").resources.workers == 2


@pytest.mark.parametrize(
    ("name", "parameters", "steps", "batch", "betas", "warmup"),
    [
        ("sparsedm_cifar10", 44_255_328, 500_000, 128, (0.99, 0.999), 2500),
        ("sparsedm_celeba64", 44_292_228, 500_000, 128, (0.99, 0.99), 5000),
        ("sparsedm_imagenet", 286_763_172, 300_000, 1024, (0.99, 0.99), 5000),
    ],
)
def test_sparsedm_has_the_published_recipe(
    name: str, parameters: int, steps: int, batch: int, betas: tuple[float, float], warmup: int
) -> None:
    trial = space.trial(load(name), {"method": "nm_ste", "sparsity": 0.5, "loss": "both"})
    train, optimizer, setting = trial.train, trial.optimizer, trial.sparse.setting
    assert (train.steps, train.batch_size, train.ema_decay) == (steps, batch, 0.9999)
    assert (optimizer.lr, optimizer.weight_decay, optimizer.betas, optimizer.warmup_steps) == (
        2e-4,
        0.03,
        betas,
        warmup,
    )
    assert (setting("m"), setting("refresh_interval"), setting("ste"), setting("sr_lambda")) == (4, 1, "sr", 2e-4)
    assert (setting("start"), setting("teacher_weight"), setting("stage_steps")) == ("teacher", 0.1, 100_000)
    cost = setup.estimate(trial)
    assert cost.params_total == parameters
    assert set(cost.densities.values()) == {0.5}, "all that SparseDM makes sparse, and nothing else"
    assert cost.stays_dense == {}
    ending = (".qkv.weight", ".proj.weight", ".fc1.weight", ".fc2.weight")
    assert set(cost.densities) == {key for key in cost.macs if key.endswith(ending)}
