"""The lengths of the training clips, and the micro-batches they make: of the recipe's dataset, or of CMU-MOSEI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

from dist_train.audio import SAMPLE_RATE
from dist_train.build import fit_to_dataset, open_split, training_plan
from dist_train.costs import audio_seconds, clip_costs, tokens
from dist_train.plan_model import Clip
from dist_train.recipe import Recipe, Widths
from sharding.errors import UserError
from sharding.shards import Columns
from sharding.shuffle import Source
from sharding.table import Table

# CMU-MOSEI: number of training clips; log-normal lengths in seconds, clipped; English; one face vector per word.
MOSEI_CLIPS, MOSEI_MEAN, MOSEI_SIGMA, MOSEI_BOUNDS = 16_326, 7.3, 0.6, (1.0, 60.0)
CHARACTERS_PER_SECOND, FACES_PER_SECOND = 15.0, 2.7
MOSEI_WIDTHS = {"audio": 1024, "text": 4096, "simulated": 4096, "vision": 1024}
CHARACTERS_PER_TOKEN = 4.0  # English, Llama's tokenizer
LOOKED_AT = 500  # steps of an epoch
SMALL_VOCABULARY, CHARACTERS_PER_SMALL_TOKEN = 8192, 2.5


@dataclass
class Corpus:
    """The training split as far as the planner needs it.

    Args:
        columns: lengths of the clips, as the shards' index has them.
        source: for the report.
        sources: what an epoch draws from.
    """

    columns: Columns | Table
    source: str
    sources: tuple[Source, ...]

    @property
    def keys(self) -> Sequence[str]:
        """Names of the clips."""
        return self.columns.key


class Load(NamedTuple):
    """How the clips of an epoch fall on the ranks.

    Args:
        worst, lightest: the micro-batches that take most and least.
        typical: of the step in the middle, the micro-batch of the slowest rank, for each micro-step.
        micro_steps: per optimizer step, on average.
        steps: optimizer steps per epoch.
        clips: per epoch.
        seconds, tokens: padded seconds and packed tokens of the worst micro-batch, as `data.budget` counts them.
        longest_seconds, longest_tokens: of a single clip.
        longest: of the step whose longest answer is in the middle, the micro-batch with the longest one, for each
            micro-step.
        gathered: rows that each rank gives to the exchanges of the loss in the step in the middle, fillers included.
    """

    worst: list[Clip]
    lightest: list[Clip]
    typical: list[list[Clip]]
    micro_steps: float
    steps: int
    clips: int
    seconds: float
    tokens: float
    longest_seconds: float
    longest_tokens: float
    longest: list[list[Clip]]
    gathered: int


def corpus_of(recipe: Recipe) -> tuple[Recipe, Corpus]:
    """The recipe with its dataset's widths, and its training clips; without the dataset, those of CMU-MOSEI.

    Raises:
        UserError: the dataset is there and does not fit the recipe, or is not there and alone could name the classes.
    """
    roots = [recipe.data.path] if recipe.data.sources is None else [source.path for source in recipe.data.sources]
    if any((Path(root) / "dataset.json").is_file() for root in roots if root is not None):
        split = open_split(recipe, "train")
        return fit_to_dataset(recipe), Corpus(split.columns, recipe.data.name, split.sources)
    if recipe.task.classifies and not recipe.task.classes:
        problem = f"is missing, and {recipe.data.name}, which could name them, is not there"
        raise UserError("task.classes", problem, "Write task.classes: [first, second, …], or make the shards first.")
    recipe = recipe.model_copy(update={"widths": Widths(**MOSEI_WIDTHS)})
    source = (
        f"CMU-MOSEI as published ({recipe.data.name} is not there): {MOSEI_CLIPS} clips, log-normal lengths of "
        f"{MOSEI_MEAN} s on average"
    )
    return recipe, Corpus(mosei(recipe), source, (Source(MOSEI_CLIPS),))


def mosei(recipe: Recipe) -> Columns:
    """Lengths spread like those of CMU-MOSEI, in no order."""
    normal = NormalDist(np.log(MOSEI_MEAN) - MOSEI_SIGMA**2 / 2, MOSEI_SIGMA)
    ranks = (np.random.default_rng(0).permutation(MOSEI_CLIPS) + 0.5) / MOSEI_CLIPS
    seconds = np.clip(np.exp([normal.inv_cdf(rank) for rank in ranks]), *MOSEI_BOUNDS)
    seconds = np.minimum(seconds, recipe.audio.max_seconds)
    characters = np.round(seconds * CHARACTERS_PER_SECOND).astype(int)
    return Columns.model_construct(
        key=[f"(clip {index} like CMU-MOSEI's)" for index in range(MOSEI_CLIPS)],
        audio_seconds=seconds.tolist(),
        audio_frames=np.round(seconds * 50).astype(int).tolist(),
        text_characters=characters.tolist(),
        text_frames=np.round(characters / CHARACTERS_PER_TOKEN).astype(int).tolist(),
        simulated_frames=np.round(characters / CHARACTERS_PER_TOKEN).astype(int).tolist(),
        vision_frames=np.ceil(seconds * FACES_PER_SECOND).astype(int).tolist(),
    )


def characters_per_token(recipe: Recipe) -> float:
    """Of a transcript, by the size of the vocabulary."""
    given = recipe.text.pretrained is not None or recipe.text.tokenizer is not None
    small = not given and recipe.text.vocabulary <= SMALL_VOCABULARY
    return CHARACTERS_PER_SMALL_TOKEN if small else CHARACTERS_PER_TOKEN


def clip_of(recipe: Recipe, columns: Columns | Table, index: int) -> Clip:
    """Lengths of one clip as the model sees them; nothing is left of one that will be set aside."""
    too_long = recipe.audio.input == "waveform" and (columns.audio_seconds[index] or 0) > recipe.audio.max_seconds
    if too_long and recipe.data.on_bad_sample == "set_aside":
        return Clip(0, 0, int(columns.vision_frames[index] or 0), 1)
    if recipe.audio.input == "waveform":
        audio = round((columns.audio_seconds[index] or 0) * SAMPLE_RATE)
    else:
        audio = int(columns.audio_frames[index] or 0)
    said = round((columns.text_characters[index] or 0) / characters_per_token(recipe))
    if recipe.text.input == "features":
        text = int(columns.text_frames[index] or 0)
    else:
        text = min(said + 1, recipe.text.max_tokens) if said else 0
    answer = min(said + 1, recipe.simulation.max_new_tokens)
    simulated = int(columns.simulated_frames[index] or 0) if recipe.simulation.rollout == "features" else 0
    return Clip(audio, text, int(columns.vision_frames[index] or 0), answer, simulated)


def load_of(recipe: Recipe, corpus: Corpus, world: int) -> Load:
    """Lays one epoch over the ranks as training does, and picks the micro-batches that count."""
    split: Any = corpus  # of a split, the costs need the index only
    seconds = audio_seconds(recipe, corpus.columns)
    words = tokens(recipe, corpus.columns, seconds)
    plan = training_plan(recipe, corpus.sources, world, epoch=0, costs=clip_costs(recipe, split))
    slots: dict[tuple[int, int, int], np.ndarray] = {}
    looked_at = min(plan.steps, LOOKED_AT)
    for step in range(looked_at):
        slots.update({(step, micro, rank): np.array(rows) for micro, rank, rows in plan.micro_batches(step)})
    padded = {place: len(rows) * seconds[rows].max() for place, rows in slots.items()}
    packed = {place: words[rows].sum() for place, rows in slots.items()}
    most_padded, most_packed = max(padded.values()), max(packed.values()) or 1.0  # where nothing is read: no tokens
    weight = {place: padded[place] / most_padded + packed[place] / most_packed for place in slots}

    slowest: dict[tuple[int, int], tuple[float, int]] = {}
    for (step, micro, rank), value in weight.items():
        slowest[step, micro] = max(slowest.get((step, micro), (0.0, 0)), (value, rank))
    totals = np.zeros(looked_at)
    for (step, _), (value, _) in slowest.items():
        totals[step] += value
    middle = int(np.argsort(totals)[looked_at // 2])

    def clips(place: tuple[int, int, int]) -> list[Clip]:
        return [clip_of(recipe, corpus.columns, int(index)) for index in slots[place]]

    worst = max(weight, key=weight.__getitem__)
    characters = np.array([found or 0 for found in corpus.columns.text_characters])
    said = {place: characters[rows].max() for place, rows in slots.items()}
    tops = [characters[plan.batch(step)].max() for step in range(looked_at)]
    answered = int(np.argsort(tops)[looked_at // 2])
    answers: dict[int, tuple[int, int, int]] = {}
    for place in slots:
        if place[0] == answered and said[place] >= said[answers.setdefault(place[1], place)]:
            answers[place[1]] = place
    counts = plan.rows(middle)
    exact = recipe.training.accumulated_loss == "exact"
    most = max(map(sum, zip(*counts, strict=True))) if exact else sum(map(max, counts))
    return Load(
        clips(worst),
        clips(min(weight, key=weight.__getitem__)),
        [clips((middle, micro, slowest[middle, micro][1])) for micro in range(plan.micro_steps(middle))],
        sum(plan.micro_steps(step) for step in range(looked_at)) / looked_at,
        plan.steps,
        len(corpus.keys),
        float(padded[worst]),
        float(packed[worst]),
        float(seconds.max()),
        float(words.max()),
        [clips(answers[micro]) for micro in sorted(answers)],
        most,
    )
