"""What a run prints at its end."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

NAMES = {
    "mae": "MAE",
    "corr": "Pearson r",
    "acc2_nonzero": "Acc-2 (non-zero)",
    "acc2_has0": "Acc-2 (has 0)",
    "f1_nonzero": "F1 (non-zero)",
    "f1_has0": "F1 (has 0)",
    "acc7": "Acc-7",
}


def scores_table(scores: dict[str, Any], title: str) -> Table:
    """Both flows, their gap and the trivial floor, a line per metric; how well the missing flow's text is known."""
    table = Table(title=title)
    for column in ("", "complete", "text missing", "gap", "floor"):
        table.add_column(column, justify="left" if column == "" else "right")
    for name, shown in NAMES.items():
        values = [scores[part].get(name) for part in ("complete", "missing", "gap", "floor")]
        table.add_row(shown, *("–" if value is None else f"{value:.3f}" for value in values))
    if "transcription" in scores:
        table.add_row("transcript (nats/token)", "–", f"{scores['transcription']['nats_per_token']:.3f}", "–", "–")
    return table


def show(item: Any) -> None:
    """Prints a rich renderable."""
    Console().print(item)
