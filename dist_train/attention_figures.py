"""Figure of attention_SPLIT.safetensors: how CMPT's tokens attend over the sound of one clip."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dist_train.figures import FAINT, INK, NEUTRAL

CARD = 3.3  # inches: a clip's card is narrow
BRIGHTEST = 99.5  # percentile that gets the brightest colour: one peak would leave the rest black


def token_attention(weights: np.ndarray, targets: list[str], frame_seconds: float, envelope: np.ndarray) -> Figure:
    """Over the time of the clip: its waveform, and below it a heatmap for each token, a row per layer. Unit: the weight
    of a frame if all frames had the same, so that clips of different length compare.

    Args:
        weights: [layers, K, 1 + T], on the tokens together and on each frame.
        targets: [K], what the tokens stand for.
        frame_seconds: 0: no unit of time is known, and steps are counted.
        envelope: [n] largest amplitude in n equal parts of the clip; empty where there is no sound.
    """
    layers, _, frames = weights.shape
    frames -= 1
    end = frames * (frame_seconds or 1)
    heights = ([0.5] if len(envelope) else []) + [0.34 + 0.09 * min(layers, 24)] * len(targets)
    figure = Figure(figsize=(CARD, sum(heights) + 0.34 * len(heights) + 0.55))
    panels = list(figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0])
    if len(envelope):
        axes = panels[0]
        middle = (np.arange(len(envelope)) + 0.5) * end / len(envelope)
        axes.fill_between(middle, -envelope, envelope, color=NEUTRAL, linewidth=0)
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    shares = weights[..., 1:].astype(np.float64) * frames
    top = float(np.percentile(shares, BRIGHTEST)) or 1.0
    for number, (axes, target) in enumerate(zip(panels[-len(targets) :], targets, strict=True)):
        image = axes.imshow(
            shares[:, number], cmap="cividis", vmin=0, vmax=top, aspect="auto", origin="lower",
            extent=(0, end, 0.5, layers + 0.5),
        )  # fmt: skip
        axes.set_title(f"token for {target}", color=INK)
        axes.set_ylabel("layer")
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=1))
        axes.grid(visible=False)
        axes.spines[:].set_color(FAINT)
    panels[-1].set_xlim(0, end)
    panels[-1].set_xlabel("seconds" if frame_seconds else "step of the audio features")
    bar = figure.colorbar(image, ax=panels, location="bottom", shrink=0.8, aspect=28, pad=0.02)
    bar.set_label("weight (1: as if all frames weighed the same)")
    bar.outline.set_visible(False)
    return figure
