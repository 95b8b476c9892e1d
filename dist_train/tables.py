"""What a run prints at its end."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_train.names import FLOWS
from dist_train.robustness_record import Robustness, Scores
from dist_train.task import MEASURES, Kind

SHOWN: dict[Kind, tuple[str, ...]] = {
    "regression": ("mae", "corr", "acc2_nonzero", "f1_nonzero"),
    "classification": ("macro_f1", "accuracy", "weighted_f1", "uar"),
}
"""Metrics in the table of robustness."""


def scores_table(scores: dict[str, Any], title: str, missing: str = "text", kind: Kind = "regression") -> Table:
    """Both flows, their gap and the trivial floor, a line per metric; of a classifier the recall of each class;
    how well the missing flow's text is known.
    """
    table = Table(title=title)
    lacks = "one missing" if missing == "random" else f"{missing} missing"
    for column in ("", "complete", lacks, "gap", "floor"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, (shown, _) in MEASURES[kind].names.items():
        values = [scores[part].get(name) for part in ("complete", "missing", "gap", "floor")]
        table.add_row(shown, *("–" if value is None else f"{value:.3f}" for value in values))
    recall = scores.get("recall", {})
    for name in recall.get("complete", {}):
        values = [recall[flow][name] for flow in FLOWS]
        gap = None if None in values else values[1] - values[0]
        table.add_row(f"recall: {name}", *("–" if value is None else f"{value:.3f}" for value in (*values, gap)), "–")
    if "imagination" in scores:
        counts = scores["imagination"]
        table.add_row("clips whose text was imagined", "–", f"{counts['imagined']} of {counts['wanted']}", "–", "–")
    if "transcription" in scores:
        table.add_row("transcript (nats/token)", "–", f"{scores['transcription']['nats_per_token']:.3f}", "–", "–")
    return table


def robustness_table(found: Robustness) -> Table:
    """Metrics under each pattern of what is there, and where half of the clips lack a modality."""
    measure = MEASURES[found.kind]
    shown = SHOWN[found.kind]
    floor = found.floor[measure.main]
    table = Table(title=f"{found.split} split: {found.clips} clips, floor {measure.title} {floor:.3f}")
    for column in ("", *(measure.names[key][0] for key in shown)):
        table.add_column(column, justify="left" if column == "" else "right")

    def line(name: str, scores: Scores) -> None:
        values = [scores.value(key) for key in shown]
        table.add_row(name, *("–" if math.isnan(value) else f"{value:.3f}" for value in values))

    for name, metrics in found.patterns.items():
        line(f"only {name}" if "+" not in name else name, metrics)
    table.add_section()
    for modality, curve in found.missing_rate.items():
        middle = curve[len(curve) // 2]
        line(f"{middle.rate:.0%} of clips lack {'one' if modality == 'random' else modality}", middle)
    table.add_section()
    for modality, kinds in found.noise.items():
        for point in kinds["ratio"][1:2]:
            line(f"{point.size:.0%} of {modality} steps noise", point.complete)
    return table


def show(item: Any) -> None:
    """Prints a rich renderable."""
    Console().print(item)
