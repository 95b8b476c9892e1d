"""Some clips of a run to look at and listen to: which, and what the page shows of each."""

from __future__ import annotations

import base64
import math
from functools import partial
from typing import Any

import numpy as np

from dist_train import attention_figures, figures
from dist_train.clip_choice import APART, TYPICAL, WRONG, choose
from dist_train.clip_media import LONGEST_PLAYED, Clip, Corpus
from dist_train.names import FLOWS
from dist_train.run_record import Run, TokenWeights, one_line
from sharding.errors import plain

LONGEST_TEXT = 800  # characters shown
RULES = {"apart": "flows apart", "wrong": "large error", "typical": "typical error"}


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
