"""Results folders made through raysparse.results, as a sweep makes them."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from raysparse.results import Facts, Outcome, Report, write_trial

PROTOCOL = json.dumps(
    {"extractor": "stroke_stats", "weights_hash": "0a1b", "layer": "all", "generated": 1000, "reference_examples": 900,
     "reference_hash": "ab12cd34", "resize": "none", "ddim_steps": 50, "eta": 0.0}
)  # fmt: skip
DENSE_FLOPS = 1e9
PARAMS = 65019


def facts(method: str = "dense", sparsity: float = 0.0, seed: int = 0, stage: str = "confirm", **changes: Any) -> Facts:
    """A trial's facts; ΔTe and p only where the method has them; config and trial id follow from the rest."""
    moving = method in ("magran", "rigl")
    p = changes.pop("prune_ratio", 0.5 if moving else None)
    interval = changes.pop("update_interval_steps", 100 if moving else None)
    steps = changes.get("total_steps", 400)
    config = {
        "seed": seed,
        "data": {"name": "hershey", "root": f"/tmp/{seed}"},
        "sparse": {"method": method, "sparsity": sparsity or None, "prune_ratio": p, "update_interval": interval},
        "optimizer": {"lr": changes.pop("lr", 0.004)},
        "train": {"steps": steps, "threads": 1},
    }
    density = 1 - sparsity
    values: dict[str, Any] = dict(
        sweep="synthetic",
        trial_id=f"{method}-{sparsity:g}-{p}-{interval}-{stage}-{seed}",
        stage=stage,
        method=method,
        seed=seed,
        model="chirodiff",
        dataset="hershey",
        allocation="erk" if method != "dense" else None,
        sparsity=sparsity,
        prune_ratio=p,
        update_interval_steps=interval,
        total_steps=steps,
        batch_size=128,
        world_size=1,
        params_total=PARAMS,
        params_active=round(PARAMS * density),
        flops_inference_paper=2 * DENSE_FLOPS * density,
        flops_inference_true=DENSE_FLOPS * density,
        flops_train_paper=200 * DENSE_FLOPS * density,
        flops_train_true=100 * DENSE_FLOPS * density,
        flops_inference_dense_paper=2 * DENSE_FLOPS,
        flops_inference_dense_true=DENSE_FLOPS,
        flops_train_dense_paper=200 * DENSE_FLOPS,
        flops_train_dense_true=100 * DENSE_FLOPS,
        protocol=PROTOCOL,
        config=json.dumps(config),
        versions=json.dumps({"raysparse": "0.1.0", "python": "3.11.9", "torch": "2.15.0"}),
        command="raysparse sweep tune_spaces/quickstart.yaml",
    )
    return Facts(**(values | changes))


def report(step: int, fid: float | None, **changes: Any) -> Report:
    """One evaluation; seconds are .1 a step unless `train_s` says otherwise."""
    values: dict[str, Any] = dict(
        step=step,
        train_loss=0.5 + 10 / (step + 10),
        validation_loss=0.52 + 10 / (step + 10),
        fid=fid,
        kid=None if fid is None else fid / 1000,
        kid_std=0.001,
        density=0.5,
        layer_density='{"gru.weight_ih_l0": 0.5}',
        topology_updates=step // 100,
        topology_changed=0.1,
        train_s=step * 0.1,
        evaluate_s=step * 0.01,
        peak_memory_bytes=10**8,
        flops_spent_paper=2e9 * step,
        flops_spent_true=1e9 * step,
    )
    return Report(**(values | changes))


def picture(shade: int = 200, size: int = 96) -> bytes:
    """A PNG of one shade of gray with a frame."""
    pixels = np.full((size, size), shade, dtype=np.uint8)
    pixels[[0, -1], :] = pixels[:, [0, -1]] = 0
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


@dataclasses.dataclass
class Folder:
    """A results folder to fill: `folder.add(facts, fids by step, ...)`."""

    path: Path

    def add(
        self,
        trial: Facts,
        fids: Iterable[tuple[int, float | None]] = (),
        state: str = "COMPLETED",
        samples: bytes | None = None,
        reason: str | None = None,
        **changes: Any,
    ) -> Path:
        points = list(fids)
        reports = [report(step, fid, density=1 - trial.sparsity, **changes) for step, fid in points]
        if samples and reports:
            reports[-1] = dataclasses.replace(reports[-1], samples_png=samples)
        rung = state == "STOPPED" and points and not (reason or "").startswith("by ")  # else a person stopped it
        stopped = points[-1][0] if rung else None
        return write_trial(self.path, trial, Outcome(state, stopped, reason), reports)


def fill_sweep(folder: Folder) -> Folder:
    """A small finished sweep: a search of nine trials (three stopped, one failed) and four confirmed over three seeds.

    Confirmed FIDs: dense 10, 11, 12; rigl .5 10.5, 11.5, 12.5; static .5 15, 16, 17; rigl .9 20, 21, 22.
    """
    for method, sparsity, fid in [
        ("dense", 0.0, 11.0), ("static", 0.5, 16.0), ("static", 0.75, 19.0), ("magran", 0.5, 15.0), ("rigl", 0.5, 11.4),
        ("rigl", 0.9, 20.0),
    ]:  # fmt: skip
        curve = [(step, fid * (1 + 40 / step)) for step in (100, 200, 300)] + [(400, fid)]
        folder.add(facts(method, sparsity, stage="search"), curve)
    folder.add(facts("static", 0.9, stage="search"), [(100, 60.0)], "STOPPED", reason="ASHA: rung 100")
    folder.add(facts("magran", 0.75, stage="search"), [(100, 40.0), (200, 35.0)], "STOPPED", reason="ASHA: rung 200")
    folder.add(facts("magran", 0.9, stage="search"), [(100, 70.0)], "STOPPED", reason="ASHA: rung 100")
    folder.add(facts("rigl", 0.75, stage="search"), [], "FAILED", reason="out of memory")
    for seed in (1, 2, 3):
        for method, sparsity, fid in [
            ("dense", 0.0, 9.0),
            ("rigl", 0.5, 9.5),
            ("static", 0.5, 14.0),
            ("rigl", 0.9, 19.0),
        ]:
            curve = [(200, fid + 20), (400, fid + seed)]
            folder.add(facts(method, sparsity, seed), curve, samples=picture(80 + 40 * seed))
    return folder


def many(folder: Folder, trials: int, reports: int) -> Folder:
    """A large search: three methods, five S, five p, a learning rate drawn per trial; one in four stopped early."""
    draw = np.random.default_rng(0)
    steps = [100 * (place + 1) for place in range(reports)]
    for number in range(trials):
        method = ("dense", "static", "magran", "rigl")[number % 4]
        sparsity = 0.0 if method == "dense" else (0.1, 0.25, 0.5, 0.75, 0.9)[number // 4 % 5]
        p = {"prune_ratio": (0.05, 0.1, 0.2, 0.3, 0.5)[number // 20 % 5]} if method in ("magran", "rigl") else {}
        level = 10 + 20 * sparsity**2 + draw.normal()
        curve = [(step, float(level * (1 + 800 / (step + 100)) * (1 + 0.02 * draw.normal()))) for step in steps]
        whole = number // 4 % 4 != 3
        trial = facts(
            method, sparsity, stage="search", trial_id=f"t{number:05d}", total_steps=steps[-1],
            lr=float(draw.uniform(1e-4, 1e-2)), **p,
        )  # fmt: skip
        folder.add(trial, curve if whole else curve[: 1 + number % reports], "COMPLETED" if whole else "STOPPED")
    return folder


def hostile(folder: Folder) -> Folder:
    """The small sweep, and beside it a section whose every text tries to become markup, and damaged files."""
    fill_sweep(folder)
    script, image = "<script>alert(1)</script>", "<img src=x onerror=alert(1)>|`x`*y*[a](http:a.b)"
    texts: dict[str, Any] = {
        "dataset": script,
        "model": image,
        "sweep": script,
        "command": script,
        "versions": script,
        "protocol": json.dumps({"extractor": '"><script>alert(2)</script>', script: image}),
    }
    for seed in (0, 1):
        named = dataclasses.replace(
            facts("rigl", 0.5, seed, **texts), method=script, trial_id=f"{seed}<b>|", config=script
        )
        folder.add(named, [(200, 12.0), (400, 11.0 + seed)], samples=b"no picture " + script.encode())
        folder.add(facts("dense", 0.0, seed, trial_id=f"d{seed}", **texts), [(200, 12.0), (400, 9.0 + seed)])
    folder.add(facts("rigl", 0.25, stage="search", trial_id="failed", **texts), [], "FAILED", reason=script)
    (folder.path / "records" / "damaged.parquet").write_bytes(b"PAR1 nonsense")
    return folder
