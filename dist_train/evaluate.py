"""Predictions of both flows over a split, their metrics, and what of them is kept."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import save_file
from torch import nn

from dist_train.batch import Collator
from dist_train.build import build_collator, build_model, open_split, to_device
from dist_train.costs import clip_costs
from dist_train.fusion import REPRESENTATION_WIDTH
from dist_train.llm import load_tokenizer
from dist_train.metrics import floors, gap, valence_metrics
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from sharding.budget import Cost
from sharding.checkpoint import fingerprint, load_weights, read_state
from sharding.collectives import device, gather_objects, together
from sharding.errors import UserError
from sharding.order import EpochPlan
from sharding.stream import ShardedSplit, stream

SHOWN_CLIPS = 96  # clips whose representations are kept for the similarity matrices (the paper's batch)
SHOWN_KEYS = 8  # named in a message


@dataclass
class Predictions:
    """Both flows over a split, in key order, on all ranks. Arrays of n clips; representations of the first
    SHOWN_CLIPS.
    """

    keys: list[str]
    label: np.ndarray
    complete: np.ndarray
    missing: np.ndarray
    present: np.ndarray  # [n, 3] audio, text, vision
    asr: np.ndarray  # [n, 2] nats of the transcript given the audio, and its tokens; 0 and 0 without
    representations: dict[str, np.ndarray]
    set_aside: list[str]


@torch.no_grad()
def predict(
    model: Callable[..., Any],
    split: ShardedSplit,
    collate: Collator,
    *,
    batch: int,
    workers: int,
    costs: tuple[Cost, ...] = (),
) -> Predictions:
    """Runs both flows over a split, cut over the ranks; every rank runs the same number of passes (collective).

    Args:
        model: DoubleFlow or an engine around it, in evaluation mode.
        batch: clips per step over all ranks.
        costs: what a rank may hold at once (`costs.clip_costs`); a step may then take several passes.

    Raises:
        UserError: no clip of the split could be read, or a prediction is not finite.
    """
    plan = EpochPlan(len(split), batch, 1, dist.get_world_size(), seed=0, epoch=0, shuffle=False, costs=costs)
    rows: list[tuple[Any, ...]] = []
    problems: list[str] = []
    batches = stream(split, plan, dist.get_rank(), collate, workers=workers)
    for _ in range(sum(plan.micro_steps(step) for step in range(plan.steps))):
        micro = together(lambda: next(batches))
        problems += micro.pop("set_aside")
        flows = model(to_device(micro, device()))
        present = torch.stack([micro["audio_present"], micro["text_present"], micro["vision_present"]], 1)
        values = [micro["index"], micro["label"], flows.complete.prediction, flows.missing.prediction, present]
        asr = torch.zeros(len(micro["label"]), 2) if flows.asr is None else flows.asr
        values += [asr, flows.complete.representation, flows.missing.representation]
        arrays = [value.float().cpu().numpy() if value.is_floating_point() else value.cpu().numpy() for value in values]
        for index, label, complete, missing, has, spoken, *representations in (
            tuple(array[row] for array in arrays) for row in np.flatnonzero(micro["real"].numpy())
        ):
            shown = [representation.copy() for representation in representations] if index < SHOWN_CLIPS else None
            rows.append(
                (int(index), float(label), float(complete), float(missing), has.tolist(), shown, spoken.tolist())
            )
    rows = sorted((row for part in gather_objects(rows) for row in part), key=lambda row: row[0])
    if not rows:
        raise UserError(f"split {split.split}", "has no clip that could be read", "Run `dist-train shards verify`.")
    wild = [split.keys[row[0]] for row in rows if not np.isfinite(row[2:4]).all()]
    if wild:
        raise UserError(
            f"split {split.split}",
            f"the prediction of {len(wild)} of {len(rows)} clips is not finite: {', '.join(wild[:SHOWN_KEYS])}",
            "Look at these clips (`dist-train shards verify`), lower optimizer.learning_rate or set "
            "optimizer.clip_norm.",
        )
    shown_rows = [row for row in rows if row[5] is not None]
    return Predictions(
        keys=[split.keys[row[0]] for row in rows],
        label=np.array([row[1] for row in rows], dtype=np.float32),
        complete=np.array([row[2] for row in rows], dtype=np.float32),
        missing=np.array([row[3] for row in rows], dtype=np.float32),
        present=np.array([row[4] for row in rows], dtype=bool),
        asr=np.array([row[6] for row in rows], dtype=np.float64),
        representations={
            "complete": np.array([row[5][0] for row in shown_rows], np.float32).reshape(-1, REPRESENTATION_WIDTH),
            "missing": np.array([row[5][1] for row in shown_rows], np.float32).reshape(-1, REPRESENTATION_WIDTH),
            "label": np.array([row[1] for row in shown_rows], dtype=np.float32),
        },
        set_aside=sorted({problem for part in gather_objects(problems) for problem in part}),
    )


def score(predictions: Predictions, train_labels: np.ndarray) -> dict[str, dict[str, Any]]:
    """Metrics of both flows, their gap, and the trivial floors; of a model that transcribes, also nats per token."""
    complete = valence_metrics(predictions.complete, predictions.label)
    missing = valence_metrics(predictions.missing, predictions.label)
    scores: dict[str, dict[str, Any]] = {
        "complete": dict(complete),
        "missing": dict(missing),
        "gap": dict(gap(complete, missing)),
        "floor": dict(floors(train_labels, predictions.label)),
    }
    nats, tokens = predictions.asr.sum(0)
    if tokens > 0:
        scores["transcription"] = {"nats_per_token": nats / tokens, "tokens": int(tokens)}
    return scores


def judged(scores: dict[str, dict[str, Any]], select_on: str) -> float:
    """What selects a checkpoint; lower is better.

    Args:
        scores: of the validation split.
        select_on: `training.select_on`.

    Raises:
        UserError: the split has nothing to judge by.
    """
    if select_on == "transcription":
        if "transcription" not in scores:
            raise UserError(
                "split valid", "has no clip with audio and transcript to judge transcription by", "Add such clips."
            )
        return float(scores["transcription"]["nats_per_token"])
    flows = ["complete", "missing"] if select_on == "mean" else [select_on]
    return float(np.mean([scores[flow]["mae"] for flow in flows]))


def write_predictions(directory: Path, split: str, predictions: Predictions) -> None:
    """predictions_<split>.csv and representations_<split>.safetensors."""
    with (directory / f"predictions_{split}.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["key", "label", "complete", "missing", "has_audio", "has_text", "has_vision"])
        for row, key in enumerate(predictions.keys):
            values = [predictions.label[row], predictions.complete[row], predictions.missing[row]]
            table.writerow([key, *(f"{value:.6g}" for value in values), *map(int, predictions.present[row])])
    save_file(predictions.representations, directory / f"representations_{split}.safetensors")


def load_trained(run: RunDirectory, recipe: Recipe, checkpoint: Path) -> tuple[nn.Module, Collator]:
    """The model of a checkpoint, in evaluation mode on this rank's device, and its collator.

    Raises:
        UserError: a damaged checkpoint, or one of another recipe or frozen base.
    """
    state = read_state(checkpoint)
    tokenizer = load_tokenizer(str(run.tokenizer))
    model = build_model(recipe, tokenizer, resumed=True)
    check_base(model, state, checkpoint)
    load_weights(model, checkpoint)
    return model.to(device()).eval(), build_collator(recipe, tokenizer, model)


def check_base(model: nn.Module, state: dict[str, Any], checkpoint: Path) -> None:
    """Refuses a checkpoint whose trainables belong to other frozen weights.

    Raises:
        UserError: the fingerprints differ.
    """
    if fingerprint(model) != state["base"]:
        raise UserError(
            str(checkpoint),
            "was trained on other frozen weights than those loaded now",
            "Point audio.pretrained and text.pretrained of the run's recipe to the original models.",
        )


def check_data(split: ShardedSplit, state: dict[str, Any], checkpoint: Path) -> None:
    """Refuses to continue a run on other clips: its order and what it has seen belong to those it began with.

    Raises:
        UserError: the content hashes differ. Other tars of the same clips have the same.
    """
    now, then = split.info.content_hash, state["content_hash"]
    if now != then:
        raise UserError(
            str(checkpoint),
            f"was trained on other clips ({then[:12]}) than the dataset holds now ({now[:12]})",
            "Resume with the run's clips (in any tars), or start a new run.",
        )


def one_base(fingerprint: str) -> str:
    """The fingerprint of the frozen weights, which every rank read for itself (collective).

    Raises:
        UserErrors: they are not the same on all ranks.
    """
    ranks: dict[str, list[int]] = {}
    for rank, found in enumerate(gather_objects(fingerprint)):
        ranks.setdefault(found, []).append(rank)

    def check() -> None:
        if len(ranks) > 1:
            first, other, *_ = ranks.values()
            raise UserError(
                "audio.pretrained, text.pretrained",
                f"hold other frozen weights on rank {other[0]} than on rank {first[0]}",
                "Give a folder that all nodes share, or the same files on each.",
            )

    together(check)
    return fingerprint


def evaluate_checkpoint(run: RunDirectory, recipe: Recipe, checkpoint: Path, split_name: str) -> dict[str, Any]:
    """Evaluates a checkpoint on a split and writes the predictions; returns the scores (collective)."""
    model, collate = load_trained(run, recipe, checkpoint)
    split = open_split(recipe, split_name)
    predictions = predict(
        model,
        split,
        collate,
        batch=recipe.data.evaluation_batch,
        workers=recipe.data.workers,
        costs=clip_costs(recipe, split),
    )
    scores = score(predictions, open_split(recipe, "train").labels)
    if dist.get_rank() == 0:
        write_predictions(run.path, split_name, predictions)
    return {**scores, "set_aside": predictions.set_aside, "clips": len(predictions.keys)}


def find_checkpoint(run: RunDirectory, name: str) -> Path:
    """`best`, `last`, or a path.

    Raises:
        UserError: there is none.
    """
    place = run.checkpoints / name if name in ("best", "last") else Path(name)
    if not place.is_dir():
        raise UserError(
            str(place), "is not a checkpoint", "Write best, last, or the path of a step_XXXXXXXX directory."
        )
    return place.resolve()
