"""When features of frozen parts are worth being made once (`dist-train extract`), and what they take on disk."""

from __future__ import annotations

import math

import numpy as np

from dist_train.costs import FRAMES_PER_SECOND
from dist_train.plan import Planner, Prediction, predict_epoch
from dist_train.plan_corpus import Corpus, characters_per_token, load_of
from dist_train.recipe import Recipe, Widths
from sharding.shards import Columns
from sharding.table import filled

HALF, SINGLE = 2, 4  # bytes
NAMES = {"audio": "WavLM", "text": "the language model"}


def caching(planner: Planner, corpus: Corpus, now: Prediction, steps: int) -> list[str]:
    """Notes on the features of a recipe with frozen parts; none where nothing is frozen.

    Args:
        planner, now: of the recipe as it is.
        corpus: its training split.
        steps: optimizer steps of an epoch.
    """
    recipe = planner.recipe
    read = {"audio": recipe.audio.input == "waveform", "text": recipe.reads_language_model}
    frozen = [part for part, there in read.items() if there and getattr(recipe, part).tuning == "frozen"]
    trained = [f"{part}.tuning is {getattr(recipe, part).tuning}" for part in read if read[part] and part not in frozen]
    if recipe.loss.asr > 0:
        trained.append("loss.asr trains the projector")
    if not frozen or recipe.text.input == "features":
        return []
    total = sum(now.flops.values())
    if trained:
        flops = sum(now.flops_of_parts.get({"audio": "audio", "text": "llm"}[part], 0.0) for part in frozen)
        names = " and ".join(NAMES[part] for part in frozen)
        return [
            f"Features cannot be made once for all epochs: {' and '.join(trained)}. Frozen is {names}, "
            f"{flops / total:.0%} of the FLOPs."
        ]
    lengths = feature_lengths(recipe, corpus)
    widths = Widths(
        audio=planner.model.audio.width,
        text=planner.model.text_width,
        simulated=planner.model.text_width,
        vision=recipe.widths.vision,
    )
    size = HALF * (
        filled(lengths.audio_frames).sum() * widths.audio
        + (filled(lengths.text_frames) + filled(lengths.simulated_frames)).sum() * widths.text
    ) + SINGLE * (filled(lengths.vision_frames).sum() * widths.vision)
    alone = offline(recipe, widths)
    other = Planner(alone, None, planner.hardware, planner.nodes, planner.per_node)
    then = predict_epoch(other, load_of(alone, Corpus(lengths, corpus.source, corpus.sources), other.world))
    seconds, left = now.seconds["step"] * steps, then.seconds["step"] * steps
    forward = now.flops.get("forward", 0.0) / max(now.flops.get("forward", 0.0) + now.flops.get("backward", 0.0), 1.0)
    once = (now.seconds["decode"] / planner.decoding + now.seconds["compute"] * forward) * steps
    rest = sum(then.flops.values()) / total
    projector = " The projector then learns no more." if recipe.simulation.imagines else ""
    names = " and ".join(NAMES[part] for part in frozen)
    told = (
        f"All of {names} is frozen: `dist-train extract` makes the features once, about {size / 1e9:.3g} GB in float16 "
        f"for the training clips and {once:.0f} s on these devices. An epoch then computes {left:.3g} s instead of "
        f"{seconds:.3g}, {rest:.2%} of the FLOPs, and reads these bytes"
    )
    if left < seconds:
        told += f": it pays from {math.ceil(once / (seconds - left)) + 1} epochs on"
    return [f"{told}.{projector}"]


def offline(recipe: Recipe, widths: Widths) -> Recipe:
    """The same training on features."""
    found = recipe.model_copy(deep=True, update={"widths": widths})
    found.audio.input = found.text.input = "features"
    found.audio.pretrained = found.audio.config = found.text.pretrained = found.text.config = None
    if found.simulation.imagines:
        found.simulation.rollout, found.simulation.projector = "features", None
    return found


def feature_lengths(recipe: Recipe, corpus: Corpus) -> Columns:
    """Steps of each clip's features, where the recipe's models make them."""
    columns, simulation = corpus.columns, recipe.simulation
    audio = filled(columns.audio_frames)
    if recipe.audio.input == "waveform":
        audio = np.floor(filled(columns.audio_seconds) * FRAMES_PER_SECOND)
    said = np.round(filled(columns.text_characters) / characters_per_token(recipe))
    text = np.where(said > 0, np.minimum(said + 1, recipe.text.max_tokens), 0)
    answer = np.minimum(said + 1, simulation.max_new_tokens) if simulation.decodes else audio // simulation.stack_frames
    simulated = np.where(audio > 0, np.maximum(answer, 1), 0) if simulation.imagines else np.zeros_like(audio)
    lengths = {"audio_frames": audio, "text_frames": text, "simulated_frames": simulated}
    found = Columns.model_construct(key=list(columns.key))
    for name, values in lengths.items():
        setattr(found, name, values.astype(int).tolist())
    for name in ("audio_seconds", "text_characters", "vision_frames"):
        setattr(found, name, list(getattr(columns, name)))
    return found
