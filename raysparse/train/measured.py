"""What is known of a trained model beside its weights: its size, its cost, and the FIDs that were measured.

Taken from the records beside the checkpoint; a folder that was exported or imported carries it along as JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from raysparse import plugins, results
from raysparse.config import TrialConfig
from raysparse.errors import UsageError
from raysparse.metrics import params
from raysparse.metrics.protocol import Protocol
from raysparse.train.restored import Restored

FLOPS = tuple(
    f"flops_{phase}{dense}_{convention}"
    for phase in ("inference", "train")
    for dense in ("", "_dense")
    for convention in ("paper", "true")
)


class Fid(BaseModel):
    """One measurement of a model, with what makes it comparable."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    fid: float
    kid: float | None
    kid_std: float | None
    protocol: str  # JSON of raysparse.metrics.protocol.Protocol


class Measured(BaseModel):
    """What is known of one model at one step."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    params_total: int = Field(ge=1)
    params_active: int = Field(ge=0)
    density: float = Field(ge=0, le=1)  # of the maskable weights
    flops: dict[str, float] | None  # the names of FLOPS; None: not known
    fids: tuple[Fid, ...]  # per protocol this very step was measured under, the trial's own first


def of(restored: Restored) -> Measured:
    """Counted from the model, and read from the records where they are beside its checkpoint.

    An imported folder has no records beside it: what it brought along is told again.
    """
    if restored.facts:
        return Measured.model_validate(restored.facts)
    active = sum(int(mask.count_nonzero()) for mask in restored.masks.values())
    size = sum(mask.numel() for mask in restored.masks.values())
    tables = list(_tables(restored))
    fids: dict[str, Fid] = {}
    for fid in (fid for rows in tables for fid in _fids(rows, restored.step)):
        fids.setdefault(fid.protocol, fid)
    return Measured(
        params_total=params.count(restored.model),
        params_active=params.active(restored.model, restored.masks),
        density=active / size if size else 1.0,
        flops=_flops(restored.config, tables),
        fids=tuple(fids.values()),
    )


def _tables(restored: Restored) -> Iterator[list[dict[str, Any]]]:
    """Rows of RESULTS/records/<trial_id>.parquet and RESULTS/evaluations/<trial_id>-*.parquet, where they are.

    The checkpoint is RESULTS/checkpoints/<trial_id>/step-<k>.
    """
    place = restored.folder.resolve()
    if len(place.parents) < 3 or place.parents[1].name != "checkpoints":
        return
    out: Path = place.parents[2]
    own = out / "records" / f"{restored.trial_id}.parquet"
    for path in [own, *sorted((out / "evaluations").glob(f"{restored.trial_id}-*.parquet"))]:
        if path.is_file():
            yield results.read_trial(path).drop_columns(["samples_png", "layer_density", "mask_sample"]).to_pylist()


def _fids(rows: list[dict[str, Any]], step: int) -> Iterator[Fid]:
    for row in rows:
        if row["step"] == step and row["fid"] is not None and not row["diverged"]:
            protocol = Protocol.from_json(row["protocol"]).json()
            yield Fid(fid=row["fid"], kid=row["kid"], kid_std=row["kid_std"], protocol=protocol)


def _flops(config: TrialConfig, tables: list[list[dict[str, Any]]]) -> dict[str, float] | None:
    """From the trial's own record; else counted, where that needs no data: a sketch's cost depends on its length."""
    if tables and tables[0]:
        return {name: tables[0][0][name] for name in FLOPS}
    try:
        spec = plugins.load("datasets", config.data.name).SPEC
    except UsageError:
        return None  # a data set that this raysparse does not have
    if spec.kind != "image":
        return None
    from raysparse.metrics import flops
    from raysparse.train.checks import model_options
    from raysparse.train.costs import costs

    cost, steps = costs(config, model_options(config), 1.0), config.train.steps
    found = {}
    for dense, suffix in ((False, ""), (True, "_dense")):
        for convention, name in ((cost.paper, "paper"), (flops.TRUE, "true")):
            found[f"flops_inference{suffix}_{name}"] = cost.inference(convention, dense=dense)
            found[f"flops_train{suffix}_{name}"] = cost.train(convention, steps, dense=dense)
    return found
