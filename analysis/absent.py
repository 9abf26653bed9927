"""What a reader may look for and not find, with the reason and what would make it."""

from __future__ import annotations

from analysis import by_sparsity, prune_ratio, sampling_steps
from analysis.parts import Part
from analysis.sections import DENSE, Section


def parts(section: Section) -> list[Part]:
    """One part with a sentence per missing thing; nothing where all is there."""
    told = tuple(filter(None, (reason(section) for reason in (_dense, _confirmed, _ratios, _steps, _sparsities))))
    return [Part("absent", "Not shown, and why", sentences=told)] if told else []


def _dense(section: Section) -> str:
    if section.dense is not None:
        return ""
    return (
        "Differences from dense, probabilities and ratios of seconds: there is no dense result. Ratios of parameters "
        "and FLOPs are to the same model at S = 0, which is counted and needs no trial."
    )


def _confirmed(section: Section) -> str:
    rows = section.confirmed
    if rows["method"].ne(DENSE).any() and rows["seeds"].gt(1).any():
        return ""
    why = "no configuration has two seeds" if len(rows) else "nothing is confirmed yet"
    return f"Spreads, bands, intervals and verdicts: {why}. One seed says nothing of the next one."


def _ratios(section: Section) -> str:
    if prune_ratio.parts(section) or not section.trials["prune_ratio"].notna().any():
        return ""
    return "FID against the prune ratio p: the results of the dynamic methods have one p or none."


def _steps(section: Section) -> str:
    if sampling_steps.parts(section) or section.ranked.empty:
        return ""
    return (
        "FID against sampling steps: no model was evaluated at another number of DDIM steps. "
        "“raysparse evaluate RESULTS --ddim-steps 50 --ddim-steps 200” does that without training anew."
    )


def _sparsities(section: Section) -> str:
    dynamic = section.configurations["prune_ratio"].notna() & section.configurations["seeds"].gt(0)
    if not dynamic.any() or len(by_sparsity.common_ratios(section)) > 1:
        return ""
    return "FID against sparsity for each p: fewer than two values of p have results at two sparsities."
