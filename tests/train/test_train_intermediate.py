"""A trial whose evaluations before the last step are cheaper ones, under a protocol of their own."""

from __future__ import annotations

import dataclasses
import json

import pytest
from trainer_state import assert_same, computed, everything, stopped_and_resumed

from raysparse import config, results
from raysparse.train import measured, reevaluate, restored, run, setup

EARLY = {"evaluate.intermediate": {"generated": 20, "ddim_steps": 2}}


def test_the_last_step_has_both_fids_and_the_others_the_cheap_one(tiny, rigl, tmp_path):
    trial, plain = tiny(rigl, EARLY), tiny(rigl)
    trainer, usual = setup.build(trial), setup.build(plain)
    cheap = setup.evaluator(trial.intermediate)
    assert cheap.protocol.generated == 20
    reports, alone = [], []
    for report in trainer.run():
        reports.append(report)
        alone.append(cheap.evaluate(trainer.ema.evaluation_model()).fid)
    assert [report.intermediate_fid for report in reports] == alone
    assert [report.fid is None for report in reports] == [True, True, False]
    assert all(report.samples_png for report in reports)
    full = list(usual.run())
    names = ("fid", "kid", "kid_std", "samples_png")
    assert [getattr(reports[-1], name) for name in names] == [getattr(full[-1], name) for name in names]
    assert {report.intermediate_fid for report in full} == {None}
    assert_same(everything(trainer, tmp_path / "a"), everything(usual, tmp_path / "b"))


@pytest.mark.parametrize("stop_after", [4, 6])
def test_resume_is_bit_exact(tiny, rigl, tmp_path, stop_after):
    # Stall counts on the intermediate FIDs.
    trial = tiny(rigl, EARLY, {"sparse.interval_schedule": "stall"})
    straight = setup.build(trial)
    expected = [computed(report) for report in straight.run()]
    second, seen = stopped_and_resumed(trial, stop_after, tmp_path / "checkpoint")
    assert seen == expected
    assert straight.engine.state_dict()["clock"] == second.engine.state_dict()["clock"]
    assert straight.engine.state_dict()["clock"]["best"] in [report["intermediate_fid"] for report in expected]


def test_an_interrupted_last_evaluation_begins_again(tiny):
    trainer = setup.build(tiny(EARLY))
    asked = []
    evaluate = trainer.evaluator.evaluate

    def last(model, should_stop, which):
        asked.append(which)
        # Batches of samples: 2 of the cheap protocol, then the first of the trial's own.
        answers = iter([False, False, True])
        return evaluate(model, (lambda: next(answers)) if which == "both" else should_stop, which)

    trainer.evaluator.evaluate = last
    assert [report.step for report in trainer.run()] == [4, 8]
    assert asked == ["intermediate", "intermediate", "both"]
    trainer.evaluator.evaluate = evaluate
    (report,) = trainer.run()
    assert report.fid is not None
    assert report.intermediate_fid is not None


def test_records_tell_each_protocol_and_what_is_known_of_a_model_is_its_own(tiny, tmp_path):
    trial = tiny(EARLY)
    run.train(trial, tmp_path, device="cpu")
    rows = results.read_trial(tmp_path / "records" / f"{trial.trial_id}.parquet").to_pylist()
    own, early = (json.loads(rows[0][name]) for name in ("protocol", "intermediate_protocol"))
    assert own == dataclasses.asdict(setup.protocol(trial))
    differing = {name: (own[name], early[name]) for name in own if own[name] != early[name]}
    assert differing == {"generated": (24, 20), "ddim_steps": (3, 2), "kid_subsets": (4, None),
                         "kid_subset_size": (16, None)}  # fmt: skip
    (fid,) = measured.of(restored.load(tmp_path)).fids
    assert fid.fid == rows[-1]["fid"]
    (again,) = reevaluate.evaluate(tmp_path, [{}], device="cpu")
    assert again.fid == rows[-1]["fid"]
    (fewer,) = reevaluate.evaluate(tmp_path, [{"evaluate.generated": 18}], device="cpu")
    (path,) = (path for path in (tmp_path / "evaluations").glob("*.parquet") if fewer.fid in _column(path, "fid"))
    assert _column(path, "intermediate_fid") == _column(path, "intermediate_protocol") == [None]


def _column(path, name):
    return results.read_trial(path)[name].to_pylist()


@pytest.mark.slow
def test_two_workers_share_both_protocols(tiny, tmp_path):
    found = {}
    for workers in (1, 2):
        reports = []
        run.train(tiny(EARLY), tmp_path / str(workers), workers=workers, device="cpu", on_report=reports.append)
        found[workers] = [report.intermediate_fid for report in reports] + [reports[-1].fid]
    assert len(found[1]) == 4
    assert found[2] == pytest.approx(found[1], rel=1e-2)


def test_a_cheaper_protocol_is_refused_where_it_is_the_dearer(tiny):
    content = tiny().model_dump(mode="json")
    with pytest.raises(config.UsageError, match=r"intermediate.ddim_steps 4 is above ddim_steps 3"):
        config.parse(config.with_value(content, "evaluate.intermediate", {"generated": 20, "ddim_steps": 4}))
