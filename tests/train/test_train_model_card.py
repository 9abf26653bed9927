"""The model card: what was measured, and under what; what was not is told too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from train_checkpoints import RIGL, STEP, in_results, save, trial

from raysparse import results
from raysparse.metrics.protocol import Protocol
from raysparse.train import export, restored


def filled(kind: Any, **known: Any) -> Any:
    """A Facts or Report with a value of the right type wherever none is given."""
    values = {bool: False, int: 1, float: 1e12, str: "x", bytes: b"x"}
    hints = get_type_hints(kind)
    return kind(**{name: values[(get_args(hint) or (hint,))[0]] for name, hint in hints.items()} | known)


def record(path: Path, trial_id: str, ddim_steps: int, fids: dict[int, float]) -> None:
    """A trial's records with these FIDs by step."""
    protocol = Protocol("inception", "h", "2048", 10_000, 12_500, "r", "bilinear 299", ddim_steps, eta=0.0, ema=True)
    facts = filled(results.Facts, trial_id=trial_id, protocol=protocol.json(), flops_train_paper=4.5e11)
    reports = [filled(results.Report, step=step, fid=fid, kid=0.012, kid_std=0.001) for step, fid in fids.items()]
    results.write_table(path, facts, results.Outcome("COMPLETED"), reports)


def test_the_card_says_what_was_measured_at_this_step(tmp_path):
    config = trial(sparse=RIGL)
    checkpoint = in_results(tmp_path / "r", config)
    for path, ddim_steps, fids in (
        (f"records/{config.trial_id}.parquet", 50, {STEP - 1: 99.5, STEP: 12.25, STEP + 1: 88.5}),
        (f"evaluations/{config.trial_id}-0.parquet", 20, {STEP: 13.75, STEP + 1: 77.5}),
        (f"evaluations/{config.trial_id}-1.parquet", 50, {STEP: 12.25}),  # again under the trial's own protocol
        ("evaluations/rigl-0123456789-0.parquet", 20, {STEP: 66.5}),  # another trial's
    ):
        record(tmp_path / "r" / path, config.trial_id, ddim_steps, fids)
    folder = export.export(tmp_path / "r", tmp_path / "out")
    text = (folder / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["library_name"] == "diffusers"
    fid, kid, *other = head["model-index"][0]["results"][0]["metrics"]
    assert (fid["type"], fid["value"], kid["type"], kid["value"]) == ("fid", 12.25, "kid", 0.012)
    assert "10000 samples against 12500 examples, DDIM 50 steps, leading timesteps" in fid["name"]
    assert "| 12.25 | 0.012 ± 0.001 |" in body
    assert [metric["value"] for metric in other] == [13.75, 0.012]
    assert "DDIM 20 steps" in other[0]["name"]
    assert not any(fid in text for fid in ("99.5", "88.5", "77.5", "66.5"))
    assert body.count("| 12.25 |") == 1
    for told in ("rigl", "S = 0.5", "0.5 |", "800 steps", "| seed | 0 |", "7 of 40,800", "4.5000e+11", "0.4500"):
        assert told in body
    active = sum(int((p != 0).sum()) for p in restored.load(checkpoint).model.parameters())
    count = int(re.search(r"\| active \| ([\d,]+) \|", body)[1].replace(",", ""))
    assert active <= count <= active + 2 * len(restored.load(checkpoint).masks)  # each layer has two active zeros
    again = export.export(export.import_(folder, tmp_path / "back"), tmp_path / "again")
    assert (again / "README.md").read_text() == text


def test_without_a_record_nothing_is_said_to_be_measured(tmp_path):
    card = (export.export(save(tmp_path / "c", trial(sparse=RIGL)), tmp_path / "out") / "README.md").read_text()
    assert "FID and KID: not measured" in card
    assert "model-index" not in card


def test_only_what_was_sparse_all_along_is_called_so(tmp_path):
    ste = {"method": "nm_ste", "teacher": "/home/somebody/teacher", "start": "teacher", "stages": "3:4"}
    said = {}
    for name, sparse in (("dense", {"method": "dense"}), ("rigl", RIGL), ("ste", ste)):
        config = trial("ddpm_unet", sparse=sparse, train__steps=200_000)
        card = (export.export(save(tmp_path / name, config), tmp_path / f"{name}-out") / "README.md").read_text()
        said[name] = card
        assert ("sparse from its first step to its last" in card) == (name == "rigl")
        assert ("sparse-to-sparse" in card) == (name == "rigl")
    assert (
        "sparse by masks over dense weights, all of which were trained (straight-through); it started from the weights "
        "of a dense network; its masks grow sparser in stages: 3:4, 2:4. "
    ) in said["ste"]


def test_the_originals_150_steps_are_told_to_have_no_scheduler(tmp_path):
    config = trial(evaluate__ddim_steps=150)
    card = (export.export(save(tmp_path / "c", config), tmp_path / "out") / "README.md").read_text()
    assert "asked for 150 steps ('original') raysparse does 167" in card
    assert "is among them" not in card


def test_a_diverged_report_is_no_measurement(tmp_path):
    config = trial(sparse=RIGL)
    in_results(tmp_path / "r", config)
    path = tmp_path / "r" / "records" / f"{config.trial_id}.parquet"
    facts = filled(results.Facts, trial_id=config.trial_id, protocol="{}")
    stand_in = filled(results.Report, step=STEP, fid=55.5, diverged=True)
    results.write_table(path, facts, results.Outcome("FAILED"), [stand_in])
    card = (export.export(tmp_path / "r", tmp_path / "out") / "README.md").read_text()
    assert "FID and KID: not measured" in card
    assert "55.5" not in card
