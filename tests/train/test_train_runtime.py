"""What samples: the same to rounding, refused where it cannot run, replaced only where that is asked for."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from two_ranks import on_two_ranks

from raysparse import cli, config, plugins
from raysparse.config import TrialConfig
from raysparse.errors import UsageError
from raysparse.models import _cuda_products, chirodiff, latent_unet
from raysparse.sparse import SparseEngine
from raysparse.train import draw, evaluate, reevaluate, restored, run, runtime, setup

SPARSE = {"evaluate.runtime": "sparse"}


@pytest.fixture(scope="module")
def trained_once(tiny, rigl, tmp_path_factory):
    trial, out = tiny(rigl, {"sparse.sparsity": 0.8}), tmp_path_factory.mktemp("trained")
    run.train(trial, out, device="cpu")
    return trial, out


@pytest.fixture
def trained(trained_once, tmp_path):
    """A results folder with one trained trial; the test's own copy."""
    shutil.copytree(trained_once[1], tmp_path / "results")
    return trained_once[0], tmp_path / "results"


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("RAYSPARSE_NATIVE", str(tmp_path / "native"))


def test_it_is_no_part_of_what_a_trial_is(tiny, rigl):
    assert tiny(rigl, SPARSE, {"train.runtime": "sparse"}).trial_id == tiny(rigl).trial_id


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_samples_are_the_same_to_rounding(trained, precision):
    """These kernels compute in float32 under bf16, too."""
    trial, out = trained
    model, changes = restored.load(out).model, SPARSE | {"evaluate.precision": precision}
    trial, asked = reevaluate.changed(trial, {}), reevaluate.changed(trial, changes)
    fast = runtime.for_sampling(model, asked)
    assert type(fast).__name__ == "SparseChiroDiff"
    want, cond = setup.evaluator(trial).sampler.batch(model, 0, 16)
    sampler = setup.evaluator(asked).sampler
    got, _ = sampler.batch(fast, 0, 16)
    assert float((want - got).abs().max()) < 1e-4
    assert torch.equal(next(draw.draw(out, 16, changes=changes)), sampler.source.to_images(got, cond))


@pytest.mark.usefixtures("compiler")
def test_a_trial_that_evaluates_with_it(tiny, rigl, trained_once, tmp_path, monkeypatch):
    from raysparse import results

    trial, measured, whole = tiny(rigl, {"sparse.sparsity": 0.8}, SPARSE), [], evaluate.Evaluator.validation_loss
    monkeypatch.setattr(
        evaluate.Evaluator,
        "validation_loss",
        lambda *given: (measured.append(type(given[1]).__name__), whole(*given))[1],
    )
    run.train(trial, tmp_path, device="cpu")
    records = f"records/{trial.trial_id}.parquet"
    ours, dense = (results.reports_of(results.read_trial(out / records)) for out in (tmp_path, trained_once[1]))
    assert [report.train_loss for report in ours] == [report.train_loss for report in dense]
    losses = [[report.validation_loss for report in reports] for reports in (ours, dense)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert measured == ["SparseChiroDiff"] * len(ours)
    assert [report.fid for report in ours] == pytest.approx([report.fid for report in dense], rel=0.05)


@pytest.mark.usefixtures("compiler")
def test_a_trial_of_pictures_evaluates_with_it(pictures, rigl, tmp_path):
    from raysparse import results

    found = {}
    for name in ("dense", "sparse"):
        trial = pictures(rigl, {"sparse.sparsity": 0.8, "evaluate.runtime": name, "train.steps": 4})
        run.train(trial, tmp_path / name, device="cpu")
        (report,) = results.reports_of(results.read_trial(tmp_path / name / f"records/{trial.trial_id}.parquet"))
        found[name] = report.validation_loss, report.fid
    assert found["sparse"] == pytest.approx(found["dense"], rel=1e-3)


@pytest.mark.usefixtures("compiler")
def test_the_commands(trained, tmp_path, capsys, monkeypatch):
    _, out = trained
    drawn = {}
    for name in ("dense", "sparse", "auto"):
        folder = tmp_path / name
        arguments = ["--output", folder, "--count", 4, "--device", "cpu", "--runtime", name]
        assert _cli(monkeypatch, "sample", out, *arguments) == 0
        drawn[name] = torch.tensor(list(Image.open(folder / "sheet.png").convert("L").tobytes())).float()
    assert torch.equal(drawn["sparse"], drawn["auto"])
    assert float((drawn["sparse"] - drawn["dense"]).abs().mean()) < 1  # of 255
    assert _cli(monkeypatch, "evaluate", out, "--device", "cpu", "--runtime", "sparse", "--json") == 0
    assert _cli(monkeypatch, "sample", out, "--output", tmp_path / "x", "--runtime", "fast") == 2
    assert "evaluate.runtime: got 'fast'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("method", ["static", "magran", "rigl"])
def test_sparse_kernels_train_to_the_same_weights(tiny, rigl, method):
    change = {"sparse.method": method, "sparse.sparsity": 0.8, "sparse.update_interval": None}
    if method != "static":
        change["sparse.update_interval"] = 3
    made = {}
    for name in ("dense", "sparse"):
        trainer = setup.build(tiny(rigl, change, {"train.runtime": name, "train.steps": 8, "train.accumulate": 2}))
        trainer._train_to(8)
        made[name] = trainer
    (dense, sparse), masks = made.values(), made["dense"].engine.masks
    assert all(torch.equal(mask, sparse.engine.masks[name]) for name, mask in masks.items())
    assert sparse._step_network() is sparse._sparse_step
    for ours, theirs in zip(sparse.model.parameters(), dense.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("compiler")
def test_linear_layers_of_pictures_train_to_the_same_weights(pictures, rigl, monkeypatch):
    from raysparse.models import _sparse_product_training, _sparse_products

    monkeypatch.setattr(_sparse_products, "_SMALL", 0)  # these layers are so small that PyTorch is faster
    monkeypatch.setattr(_sparse_product_training, "_COSTS", _sparse_product_training._COSTS._replace(laid_out=0))
    model = {
        "name": "uvit",
        "options": {"sample_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2},
    }
    made = {}
    for name in ("dense", "auto"):
        changes = {"model": model, "sparse.sparsity": 0.8, "train.runtime": name, "train.steps": 8}
        made[name] = setup.build(pictures(rigl, changes))
        made[name]._train_to(8)
    dense, sparse = made.values()
    assert sparse._step_network() is sparse._sparse_step
    assert all(torch.equal(mask, sparse.engine.masks[name]) for name, mask in dense.engine.masks.items())
    for ours, theirs in zip(sparse.model.parameters(), dense.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.usefixtures("compiler")
def test_ranks_of_which_one_has_no_compiler_all_train_dense(tiny, rigl, tmp_path):
    trial = tiny(rigl, {"train.runtime": "auto", "train.steps": 2})
    assert setup.build(trial)._sparse_step is not None
    on_two_ranks(_trained_dense, trial, tmp_path)


def _trained_dense(rank: int, trial: TrialConfig, folder: Path) -> None:
    if rank == 1:
        os.environ["CXX"] = "no-such-compiler"
    trainer = setup.build(trial, rank=rank, world_size=2)
    assert trainer._sparse_step is None
    assert trainer._train_to(2)


@pytest.mark.usefixtures("compiler")
def test_dense_gradients_are_made_where_growth_looks_at_them(tiny, rigl):
    trainer = setup.build(tiny(rigl, {"train.runtime": "sparse"}))
    dense = []
    while trainer.step < 7:
        dense.append(trainer._step_network() is trainer._network)
        trainer._train_to(trainer.step + 1)
    assert dense == [False, False, True, False, False, True, False]  # update_interval 3


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("sparse", "reason"),
    [
        ({"method": "nm_ste", "sparsity": 0.5}, "method 'nm_ste' trains the weights that the kernels would leave out"),
        ({"method": "timesteps", "sparsity": 0.5}, "method 'timesteps' has masks by timestep"),
    ],
)
def test_methods_whose_step_is_not_that_of_the_active_weights(tiny, sparse, reason):
    for refused in (setup.check, setup.build):
        with pytest.raises(UsageError, match=f"train.runtime 'sparse' cannot run here.*{reason}"):
            refused(tiny({"sparse": sparse, "train.runtime": "sparse"}))
    assert setup.build(tiny({"sparse": sparse, "train.runtime": "auto"}))._sparse_step is None


def test_masks_by_timestep_are_not_sampled_with(tiny):
    for refused in (setup.check, setup.build):
        with pytest.raises(UsageError, match=r"evaluate\.runtime 'sparse' cannot run here.*masks by timestep"):
            refused(tiny({"sparse": {"method": "timesteps", "sparsity": 0.5}}, SPARSE))


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler(trained, tiny, rigl, tmp_path, capsys, monkeypatch):
    _, out = trained
    arguments = ["--output", tmp_path / "x", "--count", 2, "--device", "cpu"]
    assert _cli(monkeypatch, "sample", out, *arguments, "--runtime", "sparse") == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "no-such-compiler" in said
    assert "install g++ or clang++" in said
    assert "'dense' or 'auto'" in said
    assert not (tmp_path / "x").exists()
    assert _cli(monkeypatch, "sample", out, *arguments, "--runtime", "auto") == 0
    for setting in ("evaluate.runtime", "train.runtime"):  # before the first step, not at the first evaluation
        with pytest.raises(UsageError, match=f"{setting} 'sparse' cannot run here.*mend this.*no-such-compiler"):
            setup.build(tiny(rigl, {setting: "sparse"}))


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A model that says so, for which its file has kernels."""
    monkeypatch.setattr(latent_unet, "sparse_runtime", lambda _: "kernels")
    return SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))


@pytest.mark.filterwarnings("ignore:.*Disabling")
def test_on_a_gpu_kernels_are_for_patterns(pictures, rigl, on_a_gpu):
    trial = pictures(rigl, SPARSE)
    with pytest.raises(UsageError, match=r"zeros of sparse\.pattern element save no time on a GPU; train with block"):
        runtime.for_sampling(on_a_gpu, trial)
    with pytest.raises(UsageError, match=r"zeros of sparse\.pattern diagonal save no time on a GPU"):
        runtime.for_sampling(on_a_gpu, pictures(rigl, SPARSE, {"sparse.pattern": "diagonal"}))
    two_of_four = pictures(rigl, SPARSE, {"sparse.pattern": "nm"})
    with pytest.raises(UsageError, match=r"2:4 is for evaluate\.precision bf16, the trial samples in fp32"):
        runtime.for_sampling(on_a_gpu, two_of_four)
    for pattern in ("block", "nm"):
        half = pictures(rigl, SPARSE, {"sparse.pattern": pattern, "train.precision": "bf16"})
        assert runtime.for_sampling(on_a_gpu, half) == "kernels"
    assert runtime.for_sampling(on_a_gpu, pictures(SPARSE)) == "kernels"


@pytest.fixture
def blocks_of(pictures, monkeypatch):
    """check_trial of a U-Net as it starts, with the kernels for a GPU, under a pattern."""
    monkeypatch.setattr(runtime, "_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(_cuda_products, "kernels", lambda: None)
    monkeypatch.setattr(latent_unet, "sparse_runtime", _cuda_products.with_sparse_products)

    def check(*changes):
        wide = {"model.options.block_out_channels": [64, 128], "sparse.method": "static", "sparse.sparsity": 0.5}
        trial = pictures(wide, {"train.precision": "bf16"}, SPARSE, *changes)
        model = latent_unet.build(latent_unet.Config(**trial.model.options), seed=0)
        settings = trial.sparse.settings().model_dump()
        engine = SparseEngine(model, torch.optim.SGD(model.parameters()), method=trial.sparse.method, **settings)
        before = [parameter.clone() for parameter in model.parameters()]
        # Units that are empty today need not be at an evaluation.
        model.remove_dead_units = lambda: pytest.fail("the masks alone are to say it")
        try:
            runtime.check_trial(model, engine, trial)
        finally:
            assert all(map(torch.equal, before, model.parameters()))

    return check


@pytest.mark.filterwarnings("ignore:.*Disabling")
def test_on_a_gpu_a_trial_whose_zeros_cannot_be_left_out_is_refused_before_its_first_step(blocks_of):
    """By its masks: a U-Net's last layers start at zero, and would count as layers without any block."""
    uniform = {"sparse.pattern": "block", "sparse.allocation": "uniform", "sparse.sparsity": 0.8}
    blocks_of(uniform, {"sparse.block": 64})
    with pytest.raises(UsageError, match=r"evaluate\.runtime 'sparse' cannot run here; .* in no layer here"):
        blocks_of(uniform, {"sparse.block": 8})
    for other in ("auto", "dense"):
        blocks_of(uniform, {"sparse.block": 8, "evaluate.runtime": other})


def test_a_cpu_leaves_out_any_zeros(pictures, rigl):
    runtime.check_trial(torch.nn.Linear(1, 1), None, pictures(rigl, SPARSE, {"sparse.pattern": "block"}))


@pytest.mark.filterwarnings("ignore:.*Disabling")
@pytest.mark.parametrize(
    ("stages", "every", "refused"),
    [("fixed", 4, False), ("3:4", 4, True), ("7:8", 4, False), ("3:4", 8, False), ("progressive", 4, True)],
)
def test_on_a_gpu_evaluations_of_earlier_stages_are_no_sparse_ones(blocks_of, monkeypatch, stages, every, refused):
    monkeypatch.setattr(_cuda_products, "why_not_two_of_four", lambda _: None)
    monkeypatch.setattr(_cuda_products, "TwoOfFourProduct", torch.nn.Identity)
    change = {"sparse.method": "nm_ste", "sparse.stages": stages, "sparse.stage_steps": 8}
    with contextlib.ExitStack() as stack:
        if refused:
            said = rf"no zeros of the stages before the last \(sparse\.stages '{stages}'\)"
            stack.enter_context(pytest.raises(UsageError, match=said))
        blocks_of(change, {"train.steps": 100, "evaluate.every_steps": every})


@pytest.mark.parametrize("name", ["latent_unet", "ddpm_unet", "uvit"])
def test_on_a_gpu_the_smallest_model_is_tried_without_zeros(pictures, monkeypatch, name):
    """Layers that start at zero would be refused whatever the trial's masks are."""
    monkeypatch.setattr(_cuda_products, "kernels", lambda: None)
    module = plugins.load("models", name)
    monkeypatch.setattr(module, "sparse_runtime", _cuda_products.with_sparse_products)
    model = config.ModelConfig(name=name)
    runtime.check(pictures(SPARSE).model_copy(update={"model": model}), torch.device("cpu"))


def test_a_trial_is_checked_with_its_masks(tiny, rigl, monkeypatch):
    seen = []
    monkeypatch.setattr(runtime, "check_trial", lambda *given: seen.append(given))
    trial = tiny(rigl)
    trainer = setup.build(trial)
    assert seen == [(trainer.model, trainer.engine, trial)]


@pytest.mark.parametrize("name", ["auto", "dense"])
def test_on_a_gpu_kernels_run_only_where_they_are_asked_for(pictures, rigl, on_a_gpu, name):
    trial = pictures(rigl, {"sparse.pattern": "block", "evaluate.runtime": name})
    assert runtime.for_sampling(on_a_gpu, trial) is on_a_gpu


@pytest.mark.filterwarnings("ignore:.*Disabling")
@pytest.mark.parametrize(
    ("change", "pays", "auto"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"train.compile": False}, True, False),
        ({"train.cuda_graph": False}, True, False),
        ({"train.precision": "fp32"}, True, False),
    ],
)
def test_on_a_gpu_auto_trains_by_blocks_where_that_is_faster(pictures, rigl, on_a_gpu, monkeypatch, change, pays, auto):
    step = SimpleNamespace(pays_for=lambda examples: pays and examples == 8)
    monkeypatch.setattr(latent_unet, "sparse_step", lambda *_: step)
    engine = SimpleNamespace(keeps_dense_weights=False, masks={})
    recorded = {"train.compile": True, "train.cuda_graph": True, "train.precision": "bf16"}
    change = {"sparse.pattern": "block", **recorded, **change}
    for name, taken in (("dense", False), ("auto", auto), ("sparse", True)):
        trial = pictures(rigl, change, {"train.runtime": name})
        assert (runtime.for_training(on_a_gpu, trial, engine, 8) is not None) == taken, name


def test_a_model_without_kernels(tiny, monkeypatch):
    monkeypatch.delattr(chirodiff, "sparse_runtime")
    with pytest.raises(UsageError, match="there are no kernels for model 'chirodiff'"):
        setup.evaluator(tiny(SPARSE))
    model = torch.nn.Linear(1, 1)
    assert runtime.for_sampling(model, tiny({"evaluate.runtime": "auto"})) is model


def _cli(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["raysparse", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(("compiled", "recorded"), [(False, False), (True, False), (True, True)])
def test_blocks_train_to_the_same_weights_on_a_gpu(pictures, rigl, compiled, recorded):
    """One compilation of the sparse step, whatever the topology does; growth takes the dense network's gradients."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    options = {"sample_size": 16, "patch_size": 4, "embed_dim": 128, "depth": 2, "num_heads": 2}
    change = {
        "model": {"name": "uvit", "options": options},
        "sparse.sparsity": 0.8,
        "sparse.pattern": "block",
        "sparse.block": 64,
        "train.steps": 8,
        "train.compile": compiled,
        "train.cuda_graph": recorded,
    }
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made = {}
    for name in ("dense", "sparse"):
        trainer = setup.build(pictures(rigl, change, {"train.runtime": name}), device="cuda")
        trainer._train_to(8)
        made[name] = trainer
    dense, sparse = made.values()
    assert sparse.engine.updates == 2
    assert sparse._step_network() is sparse._sparse_network
    assert (sparse._sparse_network is sparse._sparse_step) == (not compiled)
    if compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] in (2, 3)  # both dense models may share one
    for ours, theirs in zip(sparse.model.parameters(), dense.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-3)
