"""The first paragraph of a section, in plain words: the best sparse configuration, what it saves, costs, how sure."""

from __future__ import annotations

from typing import Any

from analysis import stats, words
from analysis.sections import CONFIDENCE, Section

Row = dict[str, Any]

COARSE = 0.1  # of dense's value; seeds that cannot show a smaller difference decide little


def sentences(section: Section) -> list[str]:
    """Plain text, one string per thought."""
    best, dense = section.best, section.dense
    if best is None:
        return [*_nothing(section, dense), *_unfinished(section)]
    told = [_best(section, best), _budgets(section, best), _saves(best), _seconds(best, dense)]
    told.append(_cost(section, best, dense))
    if best["stage"] == "confirm":
        told += [_cheapest(section, best), _lost_seeds(section)]
    return [sentence for sentence in told if sentence] + _unfinished(section)


def summary(section: Section) -> dict[str, Any]:
    """What `--json` prints of a section; NaN becomes None."""
    keep = (
        "configuration", "method", "sparsity", "prune_ratio", "update_interval_steps", "other_settings", "stage",
        "total_steps", "seeds", "fid_mean", "fid_std", "kid_mean", "kid_std", "params_active", "params_ratio",
        "flops_inference_ratio", "flops_train_ratio", "train_s", "train_s_ratio", "fid_difference",
        "fid_difference_low", "fid_difference_high", "verdict",
    )  # fmt: skip
    rows = {
        "best": section.best,
        "dense": section.dense,
        "cheapest_without_difference": section.cheapest_without_difference,
    }
    return {
        "model": section.model,
        "dataset": section.dataset,
        "fid_name": section.fid_name,
        "protocol": section.protocol,
        "trials": {str(state).lower(): int(count) for state, count in section.trials["state"].value_counts().items()},
        **{name: row and {key: _json(row[key]) for key in keep} for name, row in rows.items()},
        "text": " ".join(sentences(section)),
    }


def _json(value: Any) -> Any:
    if words.missing(value):
        return None
    return value.item() if hasattr(value, "item") else value


def _best(section: Section, best: Row) -> str:
    fid = f"{section.fid_name} {words.spread(best['fid_mean'], best['fid_std'])}"
    if best["stage"] == "confirm":
        seeds = words.seeds(int(best["seeds"]))
        return (
            f"The best sparse configuration is {words.configuration(best)}: {fid} over {seeds} at full budget; "
            f"{_pick(section, best)}."
        )
    return (
        f"Nothing sparse is confirmed over several seeds yet, so this is no claim: the lowest value of a sparse trial "
        f"so far is {words.configuration(best)} with {fid}, one seed."
    )


def _pick(section: Section, best: Row) -> str:
    """Whether we would pick it, by what the seeds show and by nothing else."""
    if section.dense is None:
        return "of what was confirmed we would pick it"
    return {
        "lower": "we would pick it, before dense",
        "higher": "by this value alone we would stay with dense",
        stats.NO_DIFFERENCE: "we would pick it where what it saves is worth what the seeds leave open",
    }.get(best["verdict"], "we would run more seeds, of dense too, before picking it")


def _budgets(section: Section, best: Row) -> str:
    """Which steps this is of, where there are results of others too."""
    others = sorted({int(steps) for steps in section.ranked["total_steps"]} - {int(best["total_steps"])})
    if not others:
        return ""
    named = words.listed([f"{steps:,}" for steps in others])
    return (
        f"Compared here are results of {best['total_steps']:,} steps alone; the tables have those of {named} steps, "
        "each against dense of its own."
    )


def _saves(best: Row) -> str:
    if not best["params_ratio"] < 1:
        return ""
    return (
        f"It keeps {words.integer(best['params_active'])} of {words.integer(best['params_total'])} parameters "
        f"({words.percent(best['params_ratio'])}), and takes {words.percent(best['flops_inference_ratio'])} of the "
        f"dense model's inference FLOPs and {words.percent(best['flops_train_ratio'])} of its training FLOPs."
    )


def _seconds(best: Row, dense: Row | None) -> str:
    if dense is None or words.missing(best["train_s_ratio"]):
        return ""
    return (
        f"Measured, training took {words.duration(best['train_s'])} where dense took "
        f"{words.duration(dense['train_s'])} ({best['train_s_ratio']:.2f} times dense per step): FLOPs are counted, "
        "seconds are measured, and masked weights are stored dense."
    )


def _cost(section: Section, best: Row, dense: Row | None) -> str:
    if dense is None:
        return (
            "There is no dense result to hold it against: what sparsity costs in FID and seconds is not known here. "
            "Ratios of parameters and FLOPs are to the same model at S = 0."
        )
    against = f"dense has {words.spread(dense['fid_mean'], dense['fid_std'])}"
    if best["stage"] != "confirm":
        return f"With one seed, {against}; seeds differ, so the gap between the two proves nothing."
    if dense["stage"] != "confirm":
        value = words.number(dense["fid_mean"])
        return f"Dense was not confirmed: its {value} is one seed of the search, so the gap to it proves nothing."
    against += f" over {words.seeds(int(dense['seeds']))}"
    if words.missing(best["verdict"]):
        return f"Held against it, {against} but at another budget (steps or batch): the two are not comparable."
    gap = best["fid_difference"]
    way = "higher (worse)" if gap > 0 else "lower (better)"
    size = f"{words.number(abs(gap), like=best['fid_mean'])} {way} than dense"
    if best["verdict"] == stats.NOT_JUDGED:
        return (
            f"Its mean is {size} ({against}); an interval needs two seeds on both sides, so no difference is claimed."
        )
    count = section.comparisons
    together = f", for all {count} comparisons with dense together" if count > 1 else ""
    sure = f"{words.percent(CONFIDENCE)} interval {_interval(best)}{together}"
    if best["verdict"] == stats.NO_DIFFERENCE:
        return (
            f"Its mean is {size} ({against}), but the {sure}, contains zero: no difference shown. "
            f"That is not proof that there is none. {_resolution(best, dense)}"
        )
    return f"Its mean is {size} ({against}; {sure})."


def _resolution(best: Row, dense: Row) -> str:
    """What size of difference these seeds could have shown."""
    half = (best["fid_difference_high"] - best["fid_difference_low"]) / 2
    told = f"These seeds could show only a difference beyond {words.number(half, like=best['fid_mean'])}"
    if dense["fid_mean"] > 0:
        share = half / dense["fid_mean"]
        told += f", {words.percent(share)} of dense's value"
        told += ": confirm more seeds before relying on it" if share > COARSE else ""
    return told + "."


def _cheapest(section: Section, best: Row) -> str:
    cheapest = section.cheapest_without_difference
    if cheapest is None or cheapest["configuration"] == best["configuration"]:
        return ""
    return (
        f"The cheapest configuration not shown to be worse than dense is {words.configuration(cheapest)}: "
        f"{words.spread(cheapest['fid_mean'], cheapest['fid_std'])}, with "
        f"{words.percent(cheapest['flops_inference_ratio'])} of the inference FLOPs (the interval of its difference "
        f"from dense is {_interval(cheapest)}: a wide one shows little)."
    )


def _interval(row: Row) -> str:
    low, high = (words.signed(row[f"fid_difference_{end}"], like=row["fid_mean"]) for end in ("low", "high"))
    return f"{low} to {high}"


def _lost_seeds(section: Section) -> str:
    rows = section.configurations
    rows = rows[rows["stage"].eq("confirm") & rows["seeds_failed"].gt(0)]
    lost = [
        f"{words.configuration(row)} ({row['seeds_failed']} of {row['seeds_started']})"
        for row in rows.to_dict("records")
    ]
    return f"Seeds that failed or diverged are missing from the means: {words.listed(lost)}." if lost else ""


def _nothing(section: Section, dense: Row | None) -> list[str]:
    if dense is not None:
        text = f"Dense reached {section.fid_name} {words.spread(dense['fid_mean'], dense['fid_std'])}"
        return [f"{text} over {words.seeds(int(dense['seeds']))}; no sparse trial has reached its full budget yet."]
    return ["No trial has reached its full budget yet, so there is no result to report."]


def _unfinished(section: Section) -> list[str]:
    states = section.trials["state"].value_counts()
    told = []
    if running := int(states.get("RUNNING", 0)):
        told.append(f"{running} of {len(section.trials)} trials are still running: everything here may change.")
    if failed := int(states.get("FAILED", 0)):
        told.append(f"{failed} {'trial' if failed == 1 else 'trials'} failed; the table of trials says why.")
    return told
