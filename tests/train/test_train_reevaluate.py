"""Evaluating trained models again: other steps, kept beside the records; samples as pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from train_checkpoints import save
from train_checkpoints import trial as saved

from raysparse import cli, results
from raysparse.errors import UsageError
from raysparse.train import draw, ranks, reevaluate, restored, run, setup, state

STEPS = [{"evaluate.ddim_steps": 2}, {"evaluate.ddim_steps": 3, "evaluate.timestep_spacing": "original"}]


@pytest.fixture(scope="module")
def trained_once(pictures, rigl, tmp_path_factory):
    trial, out = pictures(rigl), tmp_path_factory.mktemp("trained")
    run.train(trial, out, device="cpu")
    return trial, out


@pytest.fixture
def trained(trained_once, tmp_path):
    """A results folder with one trial that is trained to its end; the test's own copy."""
    trial, out = trained_once
    shutil.copytree(out, tmp_path / "results")
    return trial, tmp_path / "results"


def test_the_trials_own_protocol_gives_its_own_fid(trained):
    trial, out = trained
    (row,) = reevaluate.evaluate(out, [{}], device="cpu")
    (*_, last) = results.reports_of(results.read_trial(out / "records" / f"{trial.trial_id}.parquet"))
    assert (row.fid, row.kid, row.validation_loss, row.step) == (last.fid, last.kid, last.validation_loss, 12)
    assert json.loads(row.protocol) == dataclasses.asdict(setup.protocol(trial))


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(trained, monkeypatch):
    _, out = trained
    (out / "evaluations").touch()
    monkeypatch.setattr(reevaluate.ranks, "run", lambda *_: pytest.fail("it samples"))
    with pytest.raises(UsageError, match=r"cannot write to .*evaluations"):
        reevaluate.evaluate(out, [{}], device="cpu")


def test_a_study_of_steps_is_kept_and_not_measured_twice(trained):
    trial, out = trained
    first = reevaluate.evaluate(out, STEPS, device="cpu", command="raysparse evaluate")
    assert [row.ddim_steps for row in first] == [2, 3]
    assert [row.network_calls for row in first] == [2, 4]  # 1000 // 3 = 333, and 0, 333, 666, 999
    assert len({row.fid for row in first}) == 2
    kept = sorted((out / "evaluations").glob("*.parquet"))
    assert len(kept) == 2
    for path in kept:
        (record,) = results.reports_of(results.read_trial(path))
        table = results.read_trial(path)
        assert table["trial_id"][0].as_py() == trial.trial_id
        assert record.fid in {row.fid for row in first}
        assert record.train_s > 0
    before = [path.stat().st_mtime_ns for path in kept]
    assert reevaluate.evaluate(out, STEPS, device="cpu") == first
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert reevaluate.evaluate(out, STEPS, device="cpu", again=True) == first  # the same noise, so the same values
    assert [path.stat().st_mtime_ns for path in kept] != before
    (half,) = reevaluate.evaluate(out, [{**STEPS[0], "evaluate.precision": "bf16"}], device="cpu")
    assert half.fid != first[0].fid  # measured
    assert len(list((out / "evaluations").glob("*.parquet"))) == 3


def test_what_is_no_part_of_the_protocol_is_measured_too(trained):
    _, out = trained
    few, more = {"evaluate.validation_examples": 16}, {"evaluate.validation_examples": 64}
    (first,) = reevaluate.evaluate(out, [few], device="cpu")
    (second,) = reevaluate.evaluate(out, [more], device="cpu")
    assert second.validation_loss != first.validation_loss
    assert (second.fid, second.protocol) == (first.fid, first.protocol)
    assert reevaluate.evaluate(out, [few, more, few], device="cpu") == [first, second, first]


def test_variants_of_one_protocol_are_each_their_own(trained):
    _, out = trained
    variants = [{"evaluate.precision": precision} for precision in ("fp32", "bf16")]
    whole, half = reevaluate.evaluate(out, variants, device="cpu")
    assert whole.fid != half.fid
    assert reevaluate.evaluate(out, variants, device="cpu") == [whole, half]
    assert [reevaluate.evaluate(out, [variant], device="cpu")[0] for variant in variants] == [whole, half]


@pytest.mark.parametrize(("training", "sampling"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_trial_samples_in_another_precision_than_it_trains_in(pictures, rigl, tmp_path, training, sampling):
    reports = {}
    for precision in (None, sampling):
        trial = pictures(rigl, {"train.precision": training, "train.steps": 4, "evaluate.precision": precision})
        run.train(trial, tmp_path / str(precision), device="cpu")
        path = tmp_path / str(precision) / f"records/{trial.trial_id}.parquet"
        (reports[precision],) = results.reports_of(results.read_trial(path))
    own, other = reports[None], reports[sampling]
    assert other.train_loss == own.train_loss
    assert other.fid != own.fid
    assert other.fid == pytest.approx(own.fid, rel=0.05)
    assert other.validation_loss != own.validation_loss
    (again,) = reevaluate.evaluate(tmp_path / "None", [{"evaluate.precision": sampling}], device="cpu")
    assert (again.fid, again.kid, again.validation_loss) == (other.fid, other.kid, other.validation_loss)
    (back,) = reevaluate.evaluate(tmp_path / sampling, [{"evaluate.precision": None}], device="cpu")
    assert back.fid == own.fid


@pytest.mark.parametrize(("asked", "workers", "each"), [(None, 1, 8), (None, 2, 4), (None, 16, 1), (3, 2, 3)])
def test_workers_share_the_cores(trained, monkeypatch, asked, workers, each):
    _, out = trained
    chosen = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    member = ranks.Member(0, workers, "cpu", lambda: False, lambda _: None)
    reevaluate._work(member, restored.load(out).folder, [], asked)
    assert chosen == [each]


@pytest.mark.slow
def test_workers_share_the_samples(trained):
    _, out = trained
    (alone,) = reevaluate.evaluate(out, STEPS[:1], device="cpu")
    (shared,) = reevaluate.evaluate(out, STEPS[:1], device="cpu", workers=2, again=True)
    assert shared.fid == pytest.approx(alone.fid, rel=1e-4)
    assert shared.kid == pytest.approx(alone.kid, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sparse.sparsity": 0.9}, "sparse.sparsity belongs to what was trained"),
        ({"train.precision": "bf16"}, r"train.precision belongs to what was trained.*these can: evaluate\.\*"),
        ({"evaluate.ddim_steps": 2000}, "ddim_steps 2000 is above"),
        ({"evaluate.dim_steps": 5}, "did you mean 'ddim_steps'"),
    ],
)
def test_what_an_evaluation_cannot_be(trained, changes, said):
    with pytest.raises(UsageError, match=said):
        reevaluate.evaluate(trained[1], [changes], device="cpu")


def test_samples_as_pictures(trained, tmp_path):
    _, out = trained
    batches = list(draw.draw(out, 20, changes={"evaluate.batch_size": 8}))
    assert [tuple(batch.shape) for batch in batches] == [(8, 3, 16, 16), (8, 3, 16, 16), (4, 3, 16, 16)]
    assert all(batch.dtype == torch.uint8 for batch in batches)
    again, other = (torch.cat(list(draw.draw(out, 20, changes={"evaluate.batch_size": 8}, seed=s))) for s in (None, 9))
    assert torch.equal(again, torch.cat(batches))
    assert not torch.equal(other, again)
    sheet = draw.write(iter(batches), tmp_path / "pictures")
    with Image.open(sheet) as picture:
        assert picture.size == (5 * 16, 4 * 16)
    assert len(list((tmp_path / "pictures").glob("0*.png"))) == 20
    with pytest.raises(UsageError, match="not empty"):
        draw.write(iter(batches), tmp_path / "pictures")


def test_pictures_fill_an_empty_folder_where_it_is(tmp_path, monkeypatch):
    one = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    assert draw.write(iter([one]), tmp_path / "link") == tmp_path / "link" / "sheet.png"
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["00000.png", "sheet.png"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    draw.write(iter([one]), Path())
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["00000.png", "sheet.png"]


def test_samples_equal_what_evaluation_measures(trained):
    trial, out = trained
    model = restored.load(out).model
    sampler = setup.evaluator(trial).sampler
    x, cond = sampler.batch(model, 0, 16)
    assert torch.equal(next(draw.draw(out, 16)), sampler.source.to_images(x, cond))


def test_pictures_are_drawn_without_extractor_and_data(trained, tmp_path):
    _, out = trained
    absent = str(tmp_path / "absent")
    gone = {"evaluate.extractor": "sketch_inception", "evaluate.weights": absent, "data.source": absent}
    assert torch.equal(next(draw.draw(out, 4, changes=gone)), next(draw.draw(out, 4)))
    with pytest.raises(UsageError, match="absent"):
        reevaluate.evaluate(out, [gone], device="cpu")


def test_sketches_are_drawn_by_their_lengths_alone(tmp_path):
    trial = saved("chirodiff", data={"root": str(tmp_path / "data")}, evaluate__extractor="sketch_inception")
    (images,) = draw.draw(save(tmp_path / "c", trial), 3)
    assert len(images) == 3
    assert not list((tmp_path / "data").rglob("reference*"))  # no features of pictures that nobody compares with


def test_labels_of_a_model_without_classes(trained):
    with pytest.raises(UsageError, match="has no classes"):
        next(draw.draw(trained[1], 2, labels=[0]))


def test_the_commands(trained, tmp_path, capsys, monkeypatch):
    _, out = trained
    steps = ["--ddim-steps", "2", "--ddim-steps", "3"]
    assert _cli(monkeypatch, "evaluate", str(out), *steps, "--device", "cpu", "--pictures", str(tmp_path / "p")) == 0
    table = capsys.readouterr().out
    assert "rigl" in table
    assert len(list((tmp_path / "p").glob("*.png"))) == 2
    assert _cli(monkeypatch, "evaluate", str(out), *steps, "--device", "cpu", "--json") == 0
    assert [row["ddim_steps"] for row in json.loads(capsys.readouterr().out)] == [2, 3]
    drawn = tmp_path / "drawn"
    assert _cli(monkeypatch, "sample", str(out), "--output", str(drawn), "--count", "5", "--device", "cpu") == 0
    assert len(list(drawn.glob("0*.png"))) == 5
    assert _cli(monkeypatch, "sample", str(out), "--output", str(drawn), "--count", "5", "--device", "cpu") == 2
    assert "not empty" in capsys.readouterr().err
    assert _cli(monkeypatch, "sample", str(tmp_path / "nowhere"), "--output", str(drawn), "--count", "5") == 2


def test_a_sweeps_trials_that_were_stopped_are_left_out_and_counted(trained, capsys, monkeypatch):
    trial, out = trained
    stopped = out / "checkpoints" / "rigl-stopped"
    shutil.copytree(out / "checkpoints" / trial.trial_id, stopped)
    for path in stopped.glob("*/manifest.json"):
        content = state.manifest(path.parent)
        content["config"]["train"]["steps"] = 99
        sha256 = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        path.write_text(json.dumps({"content": content, "sha256": sha256}))
    assert _cli(monkeypatch, "evaluate", str(out), "--device", "cpu", "--json") == 0
    said = capsys.readouterr()
    assert [row["trial_id"] for row in json.loads(said.out)] == [trial.trial_id]
    assert "left out, not at their last step: 1 of 2 trials; to evaluate one as it is, give its folder" in said.err
    assert f"such as {stopped}\n" in said.err
    assert _cli(monkeypatch, "evaluate", str(out), str(stopped), "--device", "cpu", "--json") == 0
    said = capsys.readouterr()
    assert [Path(row["checkpoint"]).parent.name for row in json.loads(said.out)] == [trial.trial_id, "rigl-stopped"]
    assert "left out" not in said.err


def test_the_commands_take_a_number_of_threads(trained, tmp_path, monkeypatch):
    _, out = trained
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    drawing = ["sample", str(out), "--output", str(tmp_path / "drawn"), "--count", "2"]
    for command in (drawing, ["evaluate", str(out), "--ddim-steps", "1"]):
        assert _cli(monkeypatch, *command, "--device", "cpu", "--threads", "3") == 0
    assert chosen == [3, 3]


def _cli(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["raysparse", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0
