"""Predictions of both flows over a split, their metrics, and what of them is kept."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dist_train.batch import Collator
from dist_train.build import build_collator, build_model, kept_tokenizer, open_split, to_device
from dist_train.clip_choice import choose
from dist_train.costs import clip_costs
from dist_train.fusion import REPRESENTATION_WIDTH
from dist_train.metrics import by_class, gap, predicted_classes, task_floors, task_metrics
from dist_train.missing import lacked
from dist_train.model import DoubleFlow, Flows
from dist_train.packed import Tokens
from dist_train.recipe import Recipe
from dist_train.run_directory import RunDirectory
from dist_train.run_record import one_line
from dist_train.run_state import PARTS, check_bases, read_run_state
from dist_train.task import MEASURES, TaskSettings
from dist_train.token_attention import write_attention
from sharding.budget import Cost
from sharding.checkpoint import fingerprints, load_weights
from sharding.collectives import device, gather_objects, together
from sharding.errors import UserError
from sharding.heartbeat import beat
from sharding.order import EpochPlan
from sharding.portable import Portable
from sharding.stream import ShardedSplit, stream

SHOWN_CLIPS = 96  # clips whose representations are kept for the similarity matrices (the paper's batch)
SHOWN_KEYS = 8  # named in a message
TEXT_FIELD = re.compile(r"[A-Za-z0-9_-]{1,60}")  # becomes part of a file's name


@dataclass
class Predictions:
    """Both flows over a split, in key order, on all ranks. Arrays of n clips; of a classifier `complete` and `missing`
    are logits [n, C].

    representations: of the first SHOWN_CLIPS clips, "complete" and "missing" [m, 128] and "label" [m]; "stand_in"
        [m, 3, d], see `fusion.Fused`, and "lacks" [m], number of the modality it is about, -1 for a clip that has
        no such modality and so nothing that could be imagined rightly; with VGMR also
        "refine_complete" and "refine_missing" [m, 3, k + 1], what it thinks of audio, text and vision: g and the mean
        of p as far as the recipe has them, and the gate.
    """

    keys: list[str]
    rows: list[int]  # of the split: where clips were set aside, not all
    label: np.ndarray
    complete: np.ndarray
    missing: np.ndarray
    present: np.ndarray  # [n, 3] audio, text, vision
    asr: np.ndarray  # [n, 2] nats of the transcript given the audio, and its tokens; 0 and 0 without
    said: list[str]  # the imagined text, "" where none was decoded
    representations: dict[str, np.ndarray]
    set_aside: list[str]
    imagined: np.ndarray | None = None  # [n, 2] with ProMMA: whether text is wanted, and whether it was imagined


@dataclass(frozen=True)
class Row:
    """What is said of one clip."""

    index: int
    label: float
    complete: float | list[float]
    missing: float | list[float]
    present: list[bool]
    asr: list[float]
    judged: list[float]
    said: str
    shown: dict[str, np.ndarray] | None  # of a clip whose representations are kept


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
    rows: list[Row] = []
    problems: list[str] = []
    batches = stream(split, plan, dist.get_rank(), collate, workers=workers)
    for _ in range(sum(plan.micro_steps(step) for step in range(plan.steps))):
        beat("evaluation: data")
        micro = together(lambda: next(batches))
        beat("evaluation")
        problems += micro.pop("set_aside")
        flows = model(to_device(micro, device()))
        present = torch.stack([micro["audio_present"], micro["text_present"], micro["vision_present"]], 1)
        asr = torch.zeros(len(micro["label"]), 2) if flows.asr is None else flows.asr
        judged = flows.notes["worth"][:, 1:] if "worth" in flows.notes else asr.new_full(asr.shape, torch.nan)
        said = [""] * len(asr)
        if flows.answers is not None:
            assert collate.tokenizer is not None  # where something is said, there is a language model
            said = written(flows.answers, collate.tokenizer)
        lacks = lacked(micro["dropped"])
        lacks = torch.where(present[torch.arange(len(lacks)), lacks], lacks, -1)
        vectors = {name: value.float().cpu().numpy() for name, value in {**shown_of(flows), "lacks": lacks}.items()}
        columns: dict[str, list[Any]] = {
            "index": micro["index"].tolist(),
            "label": micro["label"].tolist(),
            "complete": flows.complete.prediction.tolist(),
            "missing": flows.missing.prediction.tolist(),
            "present": present.tolist(),
            "asr": asr.tolist(),
            "judged": judged.tolist(),
            "said": said,
        }
        for row in micro["real"].nonzero().flatten().tolist():
            keeps = columns["index"][row] < SHOWN_CLIPS
            shown = {name: value[row].copy() for name, value in vectors.items()} if keeps else None
            rows.append(Row(**{name: column[row] for name, column in columns.items()}, shown=shown))
    rows = sorted((row for part in gather_objects(rows) for row in part), key=lambda row: row.index)
    if not rows:
        raise UserError(f"split {split.split}", "has no clip that could be read", "Run `dist-train shards verify`.")
    wild = [split.keys[row.index] for row in rows if not np.isfinite(np.array([row.complete, row.missing])).all()]
    if wild:
        raise UserError(
            f"split {split.split}",
            f"the prediction of {len(wild)} of {len(rows)} clips is not finite: {', '.join(wild[:SHOWN_KEYS])}",
            "Look at these clips (`dist-train shards verify`), lower optimizer.learning_rate or set "
            "optimizer.clip_norm.",
        )
    shown_rows = [(row.label, row.shown) for row in rows if row.shown is not None]
    kept = {name: np.array([shown[name] for _, shown in shown_rows], np.float32) for name in vectors}
    for flow in ("complete", "missing"):
        kept[flow] = kept[flow].reshape(-1, REPRESENTATION_WIDTH)
    return Predictions(
        keys=[split.keys[row.index] for row in rows],
        rows=[row.index for row in rows],
        label=np.array([row.label for row in rows], dtype=np.float32),
        complete=np.array([row.complete for row in rows], dtype=np.float32),
        missing=np.array([row.missing for row in rows], dtype=np.float32),
        present=np.array([row.present for row in rows], dtype=bool),
        asr=np.array([row.asr for row in rows], dtype=np.float64),
        said=[row.said for row in rows],
        imagined=None if np.isnan(rows[0].judged).any() else np.array([row.judged for row in rows]),
        representations={**kept, "label": np.array([label for label, _ in shown_rows], dtype=np.float32)},
        set_aside=sorted({problem for part in gather_objects(problems) for problem in part}),
    )


def shown_of(flows: Flows) -> dict[str, Tensor]:
    """What is kept of the clips that are shown, by its name in `Predictions.representations`."""
    shown = {"complete": flows.complete.representation, "missing": flows.missing.representation}
    if "stand_in" in flows.notes:
        shown["stand_in"] = flows.notes["stand_in"]
    for flow in ("complete", "missing"):
        if f"gate/{flow}" in flows.notes:
            values = flows.notes[f"estimates/{flow}"], flows.notes[f"gate/{flow}"][..., None]
            shown[f"refine_{flow}"] = torch.cat(values, 2)
    return shown


def written(answers: Tokens, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Each answer as one line of text, without special tokens; control characters become spaces."""
    pairs = zip(answers.ids.tolist(), answers.mask.tolist(), strict=True)
    spoken = [[token for token, real in zip(ids, mask, strict=True) if real] for ids, mask in pairs]
    return [one_line(text) for text in tokenizer.batch_decode(spoken, skip_special_tokens=True)]


def score(predictions: Predictions, train_labels: np.ndarray, task: TaskSettings) -> dict[str, dict[str, Any]]:
    """Metrics of both flows, their gap, and the trivial floors; of a classifier also confusion matrices and the recall
    of each class; of a model that transcribes, also nats per token.
    """
    complete = task_metrics(predictions.complete, predictions.label)
    missing = task_metrics(predictions.missing, predictions.label)
    scores: dict[str, dict[str, Any]] = {
        "complete": dict(complete),
        "missing": dict(missing),
        "gap": dict(gap(complete, missing)),
        "floor": dict(task_floors(predictions.complete, train_labels, predictions.label)),
    }
    if task.classifies:
        flows = {"complete": predictions.complete, "missing": predictions.missing}
        scores |= by_class(flows, predictions.label, task.classes)
    nats, tokens = predictions.asr.sum(0)
    if tokens > 0:
        scores["transcription"] = {"nats_per_token": nats / tokens, "tokens": int(tokens)}
    if predictions.imagined is not None:
        asked, imagined = predictions.imagined.sum(0)
        scores["imagination"] = {"wanted": int(asked), "imagined": int(imagined)}
    return scores


def judged(scores: dict[str, dict[str, Any]], select_on: str, task: TaskSettings) -> float:
    """What selects a checkpoint; lower is better.

    Args:
        scores: of the validation split.
        select_on: `training.select_on`.
        task: decides the metric.

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
    measure = MEASURES[task.kind]
    return float(np.mean([measure.loss(scores[flow][measure.main]) for flow in flows]))


def write_predictions(directory: Path, split: str, predictions: Predictions, classes: Sequence[str] = ()) -> None:
    """predictions_<split>.csv and representations_<split>.safetensors. Of a classifier label and predictions are places
    of classes, and FLOW:CLASS columns hold the probabilities.
    """
    flows = {"complete": predictions.complete, "missing": predictions.missing}
    placed = {flow: predicted_classes(values) for flow, values in flows.items()}
    chances = [torch.from_numpy(values).softmax(1).tolist() for values in flows.values() if classes]
    with (directory / f"predictions_{split}.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        named = [f"{flow}:{name}" for flow in flows for name in classes]
        columns = ["key", "label", *flows, "has_audio", "has_text", "has_vision", "imagined", *named]
        table.writerow(columns)
        for row, key in enumerate(predictions.keys):
            values = [predictions.label[row], *(places[row] for places in placed.values())]
            likely = [f"{chance:.6g}" for of_flow in chances for chance in of_flow[row]]
            present = map(int, predictions.present[row])
            table.writerow([key, *(f"{value:.6g}" for value in values), *present, predictions.said[row], *likely])
    save_file(predictions.representations, directory / f"representations_{split}.safetensors")


def chosen_rows(predictions: Predictions) -> list[int]:
    """The clips that a report will show: it reads predictions of six digits."""
    values = np.stack([predictions.complete, predictions.missing])
    if values.ndim == 3:
        values = torch.from_numpy(values).softmax(2).numpy()
    label, values = (six_digits(array) for array in (predictions.label, values))
    return [row for row, _ in choose(label, values, predictions.keys)]


def six_digits(values: np.ndarray) -> np.ndarray:
    """As a file of predictions has them."""
    return np.array([float(f"{value:.6g}") for value in values.flat]).reshape(values.shape)


def load_trained(
    run: RunDirectory, recipe: Recipe, directory: Path, *, accept_other_base: bool = False
) -> tuple[nn.Module, Collator]:
    """The model of a checkpoint, in evaluation mode on this rank's device, and its collator.

    Raises:
        UserError, UserErrors: a damaged checkpoint, or one of another recipe or frozen base.
    """
    checkpoint = Portable(directory)
    state = read_run_state(checkpoint)
    tokenizer = kept_tokenizer(recipe, run.tokenizer)
    model = build_model(recipe, tokenizer, resumed=True)
    if not accept_other_base:
        check_bases(directory, state.bases, fingerprints(model))
    load_weights(model, checkpoint)
    return model.to(device()).eval(), build_collator(recipe, tokenizer, model)


def same_bases(bases: dict[str, str]) -> dict[str, str]:
    """The fingerprints of the frozen weights, which every rank read for itself (collective).

    Raises:
        UserErrors: they are not the same on all ranks.
    """
    every = gather_objects(bases)

    def check() -> None:
        for rank, found in enumerate(every):
            for part in found:
                if found[part] != every[0][part]:
                    raise UserError(
                        PARTS.get(part, part),
                        f"holds other frozen weights on rank {rank} than on rank 0",
                        "Give a folder that all nodes share, or the same files on each.",
                    )

    together(check)
    return bases


def evaluate_checkpoint(
    run: RunDirectory,
    recipe: Recipe,
    checkpoint: Path,
    split_name: str,
    *,
    accept_other_base: bool = False,
    train_labels: np.ndarray | None = None,
    text_from: str | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint on a split and writes the predictions; returns the scores (collective).

    Args:
        accept_other_base: even if it was trained on other frozen weights.
        train_labels: for the floors, where the training split is open; its shards may have gone meanwhile.
        text_from: field of KEY.json, such as a recogniser's output, that is read in the place of the transcript; the
            predictions are then called after it, too.

    Raises:
        UserError: the split has no such text, or the recipe reads no transcripts.
    """
    name = split_name if text_from is None else f"{split_name}_{text_from}"
    if text_from is not None and (recipe.text.input != "transcript" or not TEXT_FIELD.fullmatch(text_from)):
        problem = (
            "needs a recipe that reads transcripts" if recipe.text.input != "transcript" else "is no name of a field"
        )
        raise UserError(
            "--text-from", problem, "Leave it out, or name a field of KEY.json by letters, digits, _ and -."
        )
    model, collate = load_trained(run, recipe, checkpoint, accept_other_base=accept_other_base)
    split = open_split(recipe, split_name)
    split.text_field = text_from
    predictions = predict(
        model,
        split,
        collate,
        batch=recipe.data.evaluation_batch,
        workers=recipe.data.workers,
        costs=clip_costs(recipe, split),
    )
    if text_from is not None and not predictions.present[:, 1].any():
        raise UserError(
            "--text-from", f"no clip of split {split_name} has {text_from} in its KEY.json", "Name a field they have."
        )
    train_labels = open_split(recipe, "train").labels if train_labels is None else train_labels
    scores = score(predictions, train_labels, recipe.task)
    if dist.get_rank() == 0:
        write_predictions(run.path, name, predictions, recipe.task.classes)
        assert isinstance(model, DoubleFlow)
        shown = [predictions.rows[row] for row in chosen_rows(predictions)]
        write_attention(run.path / f"attention_{name}.safetensors", model, split, collate, shown)
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
