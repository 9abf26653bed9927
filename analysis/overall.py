"""What stands above the sections: dense and the best sparse model of each task (Table 3), parts of the data (Table 4).

A row or a column is a section with a protocol of its own. FIDs compare within it, and these tables say so; ratios of
parameters and FLOPs compare anywhere.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import pandas as pd

from analysis import stats, words
from analysis.parts import Part
from analysis.sections import DENSE, Section
from analysis.tables import Column, Table


def parts(sections: Sequence[Section]) -> list[Part]:
    """The overview where there are two sections or more, and full against reduced data where both are there."""
    if len(sections) < 2:
        return []
    overview = overview_table(sections)
    found = [Part("overview", overview.title, tables=(overview,))]
    for number, group in enumerate(data_groups(sections)):
        table = data_table(group, number)
        found.append(Part(table.name, table.title, tables=(table,)))
    return found


def overview_table(sections: Sequence[Section]) -> Table:
    """A row per section: the best sparse configuration, dense of its budget, what it costs."""
    frame = pd.DataFrame([_row(section) for section in sections])
    columns = (
        Column("model", lambda row: words.text(row["model"]), numeric=False),
        Column("data set", lambda row: words.text(row["dataset"]), numeric=False),
        Column("variant", lambda row: words.text(row["variant"]), numeric=False),
        Column("value", lambda row: words.text(row["fid_name"]), numeric=False),
        Column("dense", lambda row: words.spread(row["dense_fid_mean"], row["dense_fid_std"])),
        Column("best sparse", lambda row: words.text(row["best"]), numeric=False),
        Column("its value", lambda row: words.spread(row["fid_mean"], row["fid_std"]),
               bold=lambda row: bool(row["fid_mean"] < row["dense_fid_mean"])),
        Column("verdict", lambda row: words.text(row["verdict"]), numeric=False),
        Column("params", lambda row: words.ratio(row["params_ratio"])),
        Column("train FLOPs", lambda row: words.ratio(row["flops_train_ratio"])),
        Column("test FLOPs", lambda row: words.ratio(row["flops_inference_ratio"])),
    )  # fmt: skip
    caption = (
        "Each row is a protocol of its own: compare within a row, never down a column of FIDs. Dense is of the budget "
        "of the best sparse one. Bold: the sparse mean is lower than dense's; whether that is more than noise, the "
        "verdict says."
    )
    return Table("overview", "Overview: dense and the best sparse model", caption, frame, columns)


def data_groups(sections: Sequence[Section]) -> list[list[Section]]:
    """Sections of the same model and data set that differ in the number of training examples alone, per group.

    Their reference sets may differ, for that is the training set; nothing else of their protocols may.
    """

    def key(section: Section) -> tuple[str, str, bool, str]:
        rest = {name: value for name, value in section.protocol.items() if not name.startswith("reference_")}
        conditional = "class-conditional" in section.variant
        return section.model, section.dataset, conditional, json.dumps(rest, sort_keys=True)

    grouped = [list(group) for _, group in groupby(sorted(sections, key=key), key)]
    return [group for group in grouped if len({section.variant for section in group}) > 1]


def data_table(group: Sequence[Section], number: int = 0) -> Table:
    """A row per method and S, a FID and a KID column per amount of data."""
    group = sorted(group, key=lambda section: section.variant)
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for place, section in enumerate(group):
        rows = section.comparable.sort_values("fid_mean", kind="stable").drop_duplicates(["method", "sparsity"])
        for row in rows.to_dict("records"):
            mine = found.setdefault(
                (row["method"], row["sparsity"]), {"method": row["method"], "sparsity": row["sparsity"]}
            )
            mine |= {f"{name}_{place}": row[name] for name in ("fid_mean", "fid_std", "kid_mean", "kid_std", "seeds")}
    frame = pd.DataFrame(found.values())
    names = [
        f"{name}_{place}" for place in range(len(group)) for name in ("fid_mean", "fid_std", "kid_mean", "kid_std")
    ]
    frame = frame.reindex(columns=["method", "sparsity", *names])
    frame = frame.sort_values(["method", "sparsity"], key=lambda c: c.replace(DENSE, "") if c.name == "method" else c)
    columns = [
        Column("method", lambda row: words.text(row["method"]), numeric=False),
        Column("S", lambda row: words.plain_number(row["sparsity"])),
    ]
    for place, section in enumerate(group):
        columns += [_data_column(frame, section, place, value) for value in ("fid", "kid")]
    caption = (
        "The best configuration of each method and S. Each amount of data is a task of its own, and where the "
        "reference set changes with it a protocol too: compare down a column, which is of one budget, the longest of "
        "its sparse ones. Bold: lower than dense in the column; underlined: the lowest sparse value."
    )
    name = "data" if number == 0 else f"data_{number}"
    title = f"Full and reduced data: {group[0].dataset}, {group[0].model}"
    return Table(name, title, caption, frame.reset_index(drop=True), tuple(columns))


def _data_column(frame: pd.DataFrame, section: Section, place: int, value: str) -> Column:
    mean = f"{value}_mean_{place}"
    sparse = frame["method"].ne(DENSE)
    dense, lowest = frame[~sparse][mean].min(), frame[sparse][mean].min()
    heading = section.fid_name if value == "fid" else section.kid_name
    return Column(
        f"{heading}, {section.variant or 'all training examples'}",
        lambda row: words.spread(row[mean], row[f"{value}_std_{place}"]),
        bold=lambda row: row["method"] != DENSE and bool(row[mean] < dense),
        underlined=lambda row: row["method"] != DENSE and bool(row[mean] == lowest),
    )


def _row(section: Section) -> dict[str, Any]:
    best = section.best
    dense = section.dense if best is None else section.dense_of(best)
    keep = (
        "method", "sparsity", "prune_ratio", "update_interval_steps", "stage", "seeds", "fid_mean", "fid_std",
        "verdict", "params_ratio", "flops_train_ratio", "flops_inference_ratio",
    )  # fmt: skip
    found = {name: None if best is None else best[name] for name in keep}
    found |= {"fid_mean": float("nan"), "fid_std": float("nan")} if best is None else {}
    if best is not None and best["stage"] != "confirm":
        found["verdict"] = stats.NOT_JUDGED
    return {
        "model": section.model, "dataset": section.dataset, "variant": section.variant, "fid_name": section.fid_name,
        "dense_fid_mean": dense["fid_mean"] if dense else float("nan"),
        "dense_fid_std": dense["fid_std"] if dense else float("nan"),
        "best": None if best is None else words.configuration(best), **found, "protocol": section.protocol_text,
    }  # fmt: skip
