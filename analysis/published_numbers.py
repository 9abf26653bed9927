"""The papers' printed numbers beside ours, where model and data set agree (analysis/published/)."""

from __future__ import annotations

from importlib.resources import files

import pandas as pd
import plotly.graph_objects as go

from analysis import marks, style, words
from analysis.markup import plain
from analysis.parts import Part
from analysis.sections import DENSE, Section
from analysis.tables import Column, Row, Table

PAPER = "Sparse-to-Sparse Training of Diffusion Models (TMLR 2025)"
# Our name of a model -> theirs.
MODELS = {"chirodiff": "chirodiff", "latent_unet": "latent_diffusion"}
CONDITIONAL = "class_conditional"


def parts(section: Section) -> list[Part]:
    """A figure of the published values on their own axis, and the table with ours beside them."""
    rows = published(section)
    if rows.empty:
        return []
    told = (
        f"Published: {PAPER}, as printed. {_difference(section, rows)} Published and own values are therefore drawn on "
        "axes of their own; what can be set side by side is how a method stands to the dense model of its own protocol."
    )
    caption = (
        "Published values only, over the same S as ours above; marks hollow, bars one standard deviation where the "
        "paper prints one. Several marks of a method at one S differ in p or are of another of the paper's tables."
    )
    return [Part("published", "Published results on this model and data set", figure(rows), caption, (told,),
                 tables=(table(section, rows),))]  # fmt: skip


def read() -> pd.DataFrame:
    """All published rows; columns: analysis/published/README.md."""
    with (files("analysis") / "published" / "sparse_to_sparse.csv").open(encoding="utf-8") as stream:
        return pd.read_csv(stream)


def published(section: Section) -> pd.DataFrame:
    """The rows of a section's model and data set, conditional ones for conditional models only."""
    rows = read()
    conditional = "class-conditional" in section.variant
    mine = rows["model"].eq(MODELS.get(section.model, "")) & rows["dataset"].eq(section.dataset)
    mine &= rows["variant"].eq(CONDITIONAL).eq(conditional)
    return rows[mine].reset_index(drop=True)


def figure(rows: pd.DataFrame) -> go.Figure:
    """Published FID over S; a mark per printed value."""
    drawn = style.figure("sparsity S", "FID as published")
    looks = style.looks(sorted(rows["method"].unique()))
    for method, points in rows.groupby("method", sort=False):
        colour, symbol = looks[method]
        drawn.add_scatter(
            x=points["sparsity"], y=points["fid"], mode="markers", name=f"{method} (published)",
            customdata=marks.keys(points),
            error_y={"type": "data", "array": points["fid_std"].fillna(0), "thickness": 1, "width": 3, "color": colour},
            marker={"symbol": f"{symbol}-open", "size": 9, "color": colour, "line": {"width": 1.5}},
            text=[_label(row) for row in points.to_dict("records")],
            hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    return drawn.update_xaxes(range=[-0.03, 1.0], tickvals=[0, 0.1, 0.25, 0.5, 0.75, 0.9])


def table(section: Section, rows: pd.DataFrame) -> Table:
    """Each published row with its ratio to the dense row of the same table, and ours at the same method, S and p."""
    dense = _dense(rows)
    ours = [_ours(section, row) for row in rows.to_dict("records")]
    bases = [section.dense_of(row) if row else None for row in ours]
    frame = rows.assign(
        dense_ratio=rows["fid"] / dense,
        own_fid=[row["fid_mean"] if row else float("nan") for row in ours],
        own_fid_std=[row["fid_std"] if row else float("nan") for row in ours],
        own_seeds=[row["seeds"] if row else 0 for row in ours],
        own_dense_ratio=[
            row["fid_mean"] / base["fid_mean"] if row and base else float("nan")
            for row, base in zip(ours, bases, strict=True)
        ],
        own_protocol=section.protocol_text,
    )
    columns = (
        Column("published in", lambda row: words.text(row["source"]), numeric=False),
        Column("data", lambda row: words.text(row["variant"]).replace("_", "-"), numeric=False),
        Column("method", lambda row: words.text(row["method"]), numeric=False),
        Column("S", lambda row: words.plain_number(row["sparsity"])),
        Column("p", lambda row: words.plain_number(row["prune_ratio"])),
        Column("DDIM steps", lambda row: words.integer(row["ddim_steps"])),
        Column("FID published", lambda row: words.spread(row["fid"], row["fid_std"])),
        Column("of its dense", lambda row: words.ratio(row["dense_ratio"])),
        Column(f"our {section.fid_name}", lambda row: words.spread(row["own_fid"], row["own_fid_std"])),
        Column("of our dense", lambda row: words.ratio(row["own_dense_ratio"])),
    )
    caption = (
        "Published as printed; ours: the lowest mean of confirmed configurations (else of search trials) with the same "
        "method, S and p, and its ratio to dense of the same budget. The two FID columns have different protocols and "
        "do not compare."
    )
    return Table("published", "Published beside ours", caption, frame, columns)


def _dense(rows: pd.DataFrame) -> pd.Series:
    """The dense FID that each row stands against: of its own table, variant and steps, else of Table 1 or 2.

    Tables 3, 9 and 10 print no dense rows; they are of the runs of Tables 1 and 2.
    """
    rows = rows.fillna({"variant": "", "ddim_steps": 0})  # a missing key would equal nothing
    known = rows[rows["method"].eq(DENSE)]
    main = known[known["source"].isin(["table 1", "table 2"])].set_index("ddim_steps")["fid"]
    own = known.set_index(["source", "variant", "ddim_steps"])["fid"]
    found = [
        own.get((row.source, row.variant, row.ddim_steps), main.get(row.ddim_steps, float("nan")))
        for row in rows.itertuples()
    ]
    return pd.Series(found, index=rows.index, dtype="float64")


def _ours(section: Section, row: Row) -> Row | None:
    for rows in (section.confirmed, section.searched):
        same = rows[rows["method"].eq(row["method"]) & rows["sparsity"].eq(row["sparsity"])]
        if not words.missing(row["prune_ratio"]):
            same = same[same["prune_ratio"].eq(row["prune_ratio"])]
        if len(same):
            return dict(same.sort_values("fid_mean", kind="stable").iloc[0])
    return None


def _difference(section: Section, rows: pd.DataFrame) -> str:
    """How the protocols differ, in words."""
    chiro = rows["model"].eq("chirodiff").all()
    theirs = {
        "extractor": "Inception of Ge et al. 2020 on drawn sketches" if chiro else "Inception by torch-fidelity",
        "generated": 10_000,
    }
    steps = sorted({int(step) for step in rows["ddim_steps"].dropna()})
    own = section.protocol
    told = [
        f"Theirs: {theirs['extractor']}, {theirs['generated']:,} samples, "
        f"{words.listed([str(step) for step in steps]) or 'an unstated number of'} DDIM steps",
        f"ours: {own.get('extractor', 'unknown extractor')}, {own.get('generated', '?')} samples, "
        f"{own.get('ddim_steps', '?')} DDIM steps, {own.get('reference_examples', '?')} reference examples",
    ]
    return "; ".join(told) + ". Even with equal settings the reference set and the networks' weights are not the same."


def _label(row: Row) -> str:
    p = "" if words.missing(row["prune_ratio"]) else f", p = {words.plain_number(row['prune_ratio'])}"
    runs = "" if words.missing(row["runs"]) else f", {words.integer(row['runs'])} runs"
    where = f"{row['source']}, {row['variant']}" if isinstance(row["variant"], str) else str(row["source"])
    steps = "" if words.missing(row["ddim_steps"]) else f", {words.integer(row['ddim_steps'])} DDIM steps"
    return (
        f"<b>{plain(str(row['method']))}, S = {words.plain_number(row['sparsity'])}{p}</b><br>"
        f"published, {plain(where)}{steps}{runs}<br>FID {words.spread(row['fid'], row['fid_std'])}"
    )
