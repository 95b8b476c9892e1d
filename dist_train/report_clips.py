"""Some clips of a run to look at and listen to: which, and what the page shows of each."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from dist_train import attention_figures, figures
from dist_train.clip_choice import APART, TYPICAL, WRONG, apart_and_wrong, choose
from dist_train.clip_media import LONGEST_PLAYED, Clip, Corpus
from dist_train.names import FLOWS
from dist_train.run_record import Predictions, Run, TokenWeights, one_line
from sharding.errors import plain

LONGEST_TEXT = 800  # characters shown
RULES = {"apart": "flows apart", "wrong": "large error", "typical": "typical error"}


class Told(NamedTuple):
    """Predictions of a clip as a page tells them, by its row.

    flows: FLOW, prediction, and error (of a classifier the probability of the label); marks: numbers on its line by
    name.
    """

    label: Callable[[int], str]
    flows: Callable[[int], list[tuple[str, str, str]]]
    marks: Callable[[int], list[tuple[str, float]]]


def told(found: Predictions) -> Told:
    """Of numbers: in label units. Of classes: by the probability of the label."""
    if not found.classes:
        return Told(
            label=lambda row: signed(found.label[row]),
            flows=lambda row: [
                (flow, signed(values[row]), signed(values[row] - found.label[row]))
                for flow, values in found.flows.items()
            ],
            marks=lambda row: [
                ("label", float(found.label[row])),
                *((flow, float(found.flows[flow][row])) for flow in FLOWS),
            ],
        )
    right = 1 - apart_and_wrong(found.label, found.values)[1]
    return Told(
        label=lambda row: found.classes[int(found.label[row])],
        flows=lambda row: [
            (flow, found.classes[int(found.flows[flow][row])], f"{right[place, row]:.2f}")
            for place, flow in enumerate(FLOWS)
        ],
        marks=lambda row: [(flow, float(right[place, row])) for place, flow in enumerate(FLOWS)],
    )


def cards(run: Run) -> dict[str, Any]:
    """What the template shows; {} without predictions."""
    found = run.predictions
    if found is None:
        return {}
    tells = told(found)
    chosen = choose(found.label, found.values, found.keys)
    corpus = Corpus(run.recipe, found.split)
    clips = [corpus.read(found.keys[row], float(found.label[row])) for row, _ in chosen]
    numbers = [0.0, 1.0] if found.classes else [number for row, _ in chosen for _, number in tells.marks(row)]
    low, high = min(numbers), max(numbers)
    decodes = any(found.imagined)
    shown = [
        {
            "key": plain(found.keys[row]) or f"row {row + 1}",
            "rule": RULES[rule],
            "label": tells.label(row),
            "flows": tells.flows(row),
            # Positions on a line from the smallest to the largest number of all clips shown, in percent.
            "marks": [
                (name, 100 * (number - low) / (high - low) if high > low else 50.0) for name, number in tells.marks(row)
            ],
            "present": ", ".join(found.present[row]) or "no modality",
            "imagined": shortened(found.imagined[row]) if decodes else None,
            "attention": attention(run.attention, found.keys[row], clip.envelope),
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
        "attends": any(card["attention"] for card in shown),
        "chances": bool(found.classes),
        "sounds": any(clip.wav for clip in clips),
        "ends": (signed(low), signed(high)),
    }


def attention(found: TokenWeights | None, key: str, envelope: np.ndarray) -> dict[str, str]:
    """Image and caption of how CMPT's tokens attend over a clip; {} where nothing was kept of it."""
    if found is None or key not in found.clips:
        return {}
    weights = found.clips[key]
    draw = partial(attention_figures.token_attention, weights, found.targets, found.frame_seconds, envelope)
    shares = " and ".join(
        f"{share:.0%} of the {target} token's"
        for share, target in zip(weights[..., 0].mean(0), found.targets, strict=True)
    )
    caption = f"Not drawn: {shares} attention, which goes to the tokens themselves (mean over layers)."
    return {"image": "data:image/png;base64," + base64.b64encode(figures.render(draw)).decode(), "caption": caption}


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
