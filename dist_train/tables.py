"""What a run prints at its end."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from dist_train.robustness_record import Robustness, Scores

NAMES = {
    "mae": "MAE",
    "corr": "Pearson r",
    "acc2_nonzero": "Acc-2 (non-zero)",
    "acc2_has0": "Acc-2 (has 0)",
    "f1_nonzero": "F1 (non-zero)",
    "f1_has0": "F1 (has 0)",
    "acc7": "Acc-7",
}


def scores_table(scores: dict[str, Any], title: str, missing: str = "text") -> Table:
    """Both flows, their gap and the trivial floor, a line per metric; how well the missing flow's text is known."""
    table = Table(title=title)
    lacks = "one missing" if missing == "random" else f"{missing} missing"
    for column in ("", "complete", lacks, "gap", "floor"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, shown in NAMES.items():
        values = [scores[part].get(name) for part in ("complete", "missing", "gap", "floor")]
        table.add_row(shown, *("–" if value is None else f"{value:.3f}" for value in values))
    if "transcription" in scores:
        table.add_row("transcript (nats/token)", "–", f"{scores['transcription']['nats_per_token']:.3f}", "–", "–")
    return table


def robustness_table(found: Robustness) -> Table:
    """Metrics under each pattern of what is there, and where half of the clips lack a modality."""
    title = f"{found.split} split: {found.clips} clips, floor MAE {found.floor['mae']:.3f}"
    table = Table(title=title)
    for column in ("", "MAE", "Pearson r", "Acc-2 (non-zero)", "F1 (non-zero)"):
        table.add_column(column, justify="left" if column == "" else "right")

    def line(name: str, scores: Scores) -> None:
        values = [getattr(scores, key, None) for key in ("mae", "corr", "acc2_nonzero", "f1_nonzero")]
        table.add_row(name, *("–" if value is None else f"{value:.3f}" for value in values))

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
