"""FID and KID against S per method (the sparse paper's Figures 2, 3, 9 to 14), the best of all p and for each p."""

from __future__ import annotations

from analysis import figures, marks, words
from analysis.parts import Part
from analysis.sections import Section

MOST_RATIOS = 3  # figures of one p each: a search draws p from a range, and then no p has a curve of its own


def over_sparsity(section: Section) -> list[Part]:
    """FID over S and KID over S, the best of all p at each S."""
    fid, kid = section.fid_name, section.kid_name
    line = "The line joins the best confirmed configuration of a method at each S; the band is dense of the "
    line += "same budget."
    return [
        Part("sparsity", f"{fid} against sparsity", figures.fid_against_sparsity(section), f"{marks.HOLLOW} {line}"),
        Part("kid", f"{kid} against sparsity", figures.fid_against_sparsity(section, "kid"), f"{marks.HOLLOW} {line}"),
    ]


def for_each_ratio(section: Section) -> list[Part]:
    """FID and KID over S for each p that was tried at several S, where there are two such p."""
    found = []
    ratios = common_ratios(section)
    for place, ratio in enumerate(ratios if len(ratios) > 1 else []):
        for name, value in ((section.fid_name, "fid"), (section.kid_name, "kid")):
            caption = f"Dynamic methods with p = {words.plain_number(ratio)} only. {marks.HOLLOW}"
            figure = figures.fid_against_sparsity(section, value, ratio)
            title = f"{name} against sparsity, p = {words.plain_number(ratio)}"
            found.append(Part(f"sparsity_{value}_p{place}", title, figure, caption))
    return found


def common_ratios(section: Section) -> list[float]:
    """The values of p that have results at two S or more, largest first; the MOST_RATIOS with most results."""
    rows = section.configurations
    rows = rows[rows["seeds"].gt(0) & rows["prune_ratio"].notna()]
    counts = rows.groupby("prune_ratio").agg(sparsities=("sparsity", "nunique"), results=("seeds", "sum"))
    counts = counts[counts["sparsities"].gt(1)].sort_values("results", ascending=False, kind="stable")
    return sorted((float(ratio) for ratio in counts.index[:MOST_RATIOS]), reverse=True)
