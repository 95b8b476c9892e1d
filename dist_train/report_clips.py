"""Some clips of a run to look at and listen to: which, and what the page shows of each."""

from __future__ import annotations

import base64
import math
from typing import Any, NamedTuple

import numpy as np

from dist_train.clip_media import LONGEST_PLAYED, Clip, Corpus
from dist_train.names import FLOWS
from dist_train.run_record import Run, one_line
from sharding.errors import plain

APART, WRONG, TYPICAL = 3, 3, 2  # clips of each kind
LONGEST_TEXT = 800  # characters shown
RULES = {"apart": "flows apart", "wrong": "large error", "typical": "typical error"}


class Chosen(NamedTuple):
    """A row of the predictions, and the rule that chose it."""

    row: int
    rule: str


def choose(label: np.ndarray, flows: dict[str, np.ndarray], keys: list[str]) -> list[Chosen]:
    """First the clips on which the flows differ most, then those with the largest error of either flow, then those
    whose mean error of both flows is nearest to its median. A clip is taken once; ties go by key. Arrays [n].
    """
    predicted = np.stack([flows[flow] for flow in FLOWS])
    errors = np.abs(predicted - label)
    mean = errors.mean(0)
    ranks = {
        "apart": (-np.abs(predicted[0] - predicted[1]), APART),
        "wrong": (-errors.max(0), WRONG),
        "typical": (np.abs(mean - np.median(mean)), TYPICAL),
    }
    chosen: list[Chosen] = []
    for rule, (rank, count) in ranks.items():
        taken = {one.row for one in chosen}
        order = (row for row in sorted(range(len(label)), key=lambda row: (rank[row], keys[row])) if row not in taken)
        chosen += [Chosen(row, rule) for row, _ in zip(order, range(count), strict=False)]
    return chosen


def cards(run: Run) -> dict[str, Any]:
    """What the template shows; {} without predictions."""
    found = run.predictions
    if found is None:
        return {}
    chosen = choose(found.label, found.flows, found.keys)
    corpus = Corpus(run.recipe, found.split)
    clips = [corpus.read(found.keys[row], float(found.label[row])) for row, _ in chosen]
    rows = [row for row, _ in chosen]
    numbers = np.concatenate([found.label[rows], *(found.flows[flow][rows] for flow in FLOWS)])
    low, high = float(numbers.min()), float(numbers.max())
    decodes = any(found.imagined)
    shown = [
        {
            "key": plain(found.keys[row]) or f"row {row + 1}",
            "rule": RULES[rule],
            "label": signed(found.label[row]),
            "flows": [
                (flow, signed(found.flows[flow][row]), signed(found.flows[flow][row] - found.label[row]))
                for flow in FLOWS
            ],
            # Positions on a line from the smallest to the largest number of all clips shown, in percent.
            "marks": [
                (name, 100 * (float(value) - low) / (high - low) if high > low else 50.0)
                for name, value in [("label", found.label[row]), *((flow, found.flows[flow][row]) for flow in FLOWS)]
            ],
            "present": ", ".join(found.present[row]) or "no modality",
            "imagined": shortened(found.imagined[row]) if decodes else None,
            **media(clip),
        }
        for (row, rule), clip in zip(chosen, clips, strict=True)
    ]
    problems = {clip.problem for clip in clips}
    if len(problems) == 1 and len(shown) > 1:  # said once, above
        shown = [{**card, "problem": ""} for card in shown]
    return {
        "split": found.split,
        "cards": shown,
        "problem": problems.pop() if len(problems) == 1 and len(shown) > 1 else "",
        "counts": (APART, WRONG, TYPICAL),
        "decodes": decodes,
        "sounds": any(clip.wav for clip in clips),
        "ends": (signed(low), signed(high)),
    }


def media(clip: Clip) -> dict[str, Any]:
    """The part of a card that comes from the shards."""
    length = ""
    if clip.wav:
        cut = clip.seconds > LONGEST_PLAYED
        length = f"first {LONGEST_PLAYED:g} s of {clip.seconds:.1f} s" if cut else f"{clip.seconds:.1f} s"
    return {
        "audio": "data:audio/wav;base64," + base64.b64encode(clip.wav).decode() if clip.wav else "",
        "length": length,
        "text": None if clip.text is None else shortened(clip.text),
        "problem": clip.problem,
    }


def shortened(text: str) -> str:
    """One line of bounded length; says how much was left out."""
    line = one_line(text[: 10 * LONGEST_TEXT])
    if len(line) <= LONGEST_TEXT:
        return line
    return f"{line[:LONGEST_TEXT]}… ({len(text):,} characters)"


def signed(value: float) -> str:
    """A number in label units with its sign."""
    value = float(value)
    form = "+.2f" if abs(value) < 1e4 else "+.3g"
    return "0.00" if math.isclose(value, 0, abs_tol=5e-3) else format(value, form).replace("-", "−")
