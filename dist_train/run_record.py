"""The record of a run, read back from its directory. What is absent or damaged is left out and named, never raised."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load

from dist_train.names import FLOWS, MODALITIES
from dist_train.robustness_record import Robustness
from dist_train.task import TaskSettings, task_of
from sharding.errors import UserError
from sharding.files import MOST_JSON, MOST_YAML, read_bounded
from sharding.plain_yaml import MOST_DEPTH, check_yaml
from sharding.shards import class_problems

MARKS = ("recipe.yaml", "metrics.jsonl", "summary.json")
MOST_RECORD = 1 << 24  # bytes of a summary or of representations; a run writes some kB of them
MOST_LAYERS = 1000  # of attention; a row each in a figure
WILDEST = 1e15
MOST_COMPARED = 1 << 26  # numbers for distances of all pairs; 0.5 GB
MOST_CLIPS = 1000  # whose distances to each other are drawn; a run keeps 96
LEAVE_OUT = "Left out"
SPLITS = ("test", "valid")  # what is shown of a run, best first


class Predictions(NamedTuple):
    """Rows of predictions_<split>.csv: arrays [n] in label units; of each clip also its key, what it has, and the
    imagined text, "" where the file does not say. Of a classifier label and flows are places in `classes`, and chances
    of each flow are its probabilities [n, C].
    """

    split: str
    label: np.ndarray
    flows: dict[str, np.ndarray]
    keys: list[str]
    present: list[list[str]]
    imagined: list[str]
    classes: list[str]
    chances: dict[str, np.ndarray]

    @property
    def values(self) -> np.ndarray:
        """[2, n] numbers of the flows, or [2, n, C] their probabilities."""
        of = self.chances if self.classes else self.flows
        return np.stack([of[flow] for flow in FLOWS])


class Representations(NamedTuple):
    """representations_<split>.safetensors: [n, 128], [n, 128], [n]; refined: of a run with VGMR, flow -> [n, 3, k + 1],
    g and the mean of p as far as it has them, and the gate, of audio, text and vision. stand_in: [n, 3, d], pooled
    vectors of the modality `lacks` [n] (number, or -1): real, as it comes in, and imagined; None of older runs.
    """

    split: str
    complete: np.ndarray
    missing: np.ndarray
    label: np.ndarray
    refined: dict[str, np.ndarray]
    stand_in: np.ndarray | None = None
    lacks: np.ndarray | None = None


class TokenWeights(NamedTuple):
    """attention_<split>.safetensors: by key of a clip, [layers, K, 1 + T], the weight that each of CMPT's K tokens
    gives to all tokens together and to each frame, mean over heads. targets: [K], what the tokens stand for;
    frame_seconds: 0 where audio comes as features.
    """

    targets: list[str]
    frame_seconds: float
    clips: dict[str, np.ndarray]


@dataclass
class Run:
    """What could be read from a run directory; `problems` says in plain words what could not."""

    path: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    predictions: Predictions | None = None
    representations: Representations | None = None
    robustness: Robustness | None = None
    attention: TokenWeights | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def task(self) -> TaskSettings:
        """What the run predicts: as its recipe says, or its predictions where the recipe is lost."""
        if not self.recipe and self.predictions is not None and self.predictions.classes:
            return TaskSettings(kind="classification", classes=self.predictions.classes)
        return task_of(self.recipe)

    @property
    def is_mosei(self) -> bool:
        """The recipe's data path names MOSEI."""
        data = self.recipe.get("data")
        path = data.get("path") if isinstance(data, dict) else None
        return re.search(r"(?<![a-z])(cmu)?mosei(?![a-z])", str(path or ""), re.IGNORECASE) is not None

    def column(self, name: str) -> np.ndarray:
        """[n] of a field of the step records; NaN where it is absent or not a number."""
        return np.array([number(record.get(name)) for record in self.steps])


def read_run(path: Path) -> Run:
    """Read a run directory. Damaged lines and files are left out and named in `problems`.

    Raises:
        UserError: not a directory, or none of a run's files in it.
    """
    if not path.is_dir():
        raise UserError(str(path), "no such directory", "Give the --output directory of a training run.")
    if not any((path / name).is_file() for name in MARKS):
        raise UserError(
            str(path),
            f"not a run directory (none of {', '.join(MARKS)} in it)",
            "Give the --output directory of a training run.",
        )
    run = Run(path)
    run.recipe = _mapping(run, "recipe.yaml", _load_yaml)
    run.environment = _mapping(run, "environment.json", json.loads)
    run.summary = _mapping(run, "summary.json", json.loads)
    run.plan = _mapping(run, "plan.json", json.loads)
    _read_metrics(run)
    for split in SPLITS:
        run.predictions = run.predictions or _read_predictions(run, split)
        run.representations = run.representations or _read_representations(run, split)
        run.robustness = run.robustness or _read_robustness(run, split)
    if run.predictions is not None:
        run.attention = _read_attention(run, run.predictions.split)
    if not (path / "summary.json").is_file():
        run.problems.insert(
            0, "No summary.json: this run was interrupted or is still training. Shown is what it wrote."
        )
    return run


def number(value: Any) -> float:
    """A float; NaN for what is none or beyond fp32 (JSON may hold null, text or Infinity where a number belongs)."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if abs(number) < 2.0**128 else math.nan


def one_line(text: str) -> str:
    """Text that breaks no row of a table: runs of whitespace and control characters are one space."""
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in text).split())


def _read_metrics(run: Run) -> None:
    try:
        text = read_bounded(run.path / "metrics.jsonl", MOST_JSON, LEAVE_OUT).decode(errors="replace")
    except (OSError, UserError):
        run.problems.append("metrics.jsonl is absent or unreadable.")
        return
    steps: dict[float, dict[str, Any]] = {}
    evals: dict[tuple[float, str], dict[str, Any]] = {}
    skipped = 0
    for line in filter(str.strip, text.splitlines()):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or not math.isfinite(step := number(record.get("step"))):
            skipped += 1
        elif record.get("kind") == "step":
            steps[step] = record  # a resumed run repeats the steps after its checkpoint: the last word counts
        elif record.get("kind") == "eval":
            evals[step, str(record.get("split"))] = record
    run.steps = [steps[step] for step in sorted(steps)]
    run.evals = [evals[key] for key in sorted(evals)]
    if skipped:
        run.problems.append(f"metrics.jsonl: {skipped} damaged line{'s' * (skipped > 1)} skipped.")


def _read_predictions(run: Run, split: str) -> Predictions | None:
    path = run.path / f"predictions_{split}.csv"
    if not path.is_file():
        return None
    try:
        file = io.StringIO(read_bounded(path, MOST_JSON, LEAVE_OUT).decode(errors="replace"), newline="")
        table = csv.DictReader(file)
        classes = classes_of(table.fieldnames or ())
        likely = [f"{flow}:{name}" for flow in FLOWS for name in classes]
        rows = [
            (
                [number(row.get(name)) for name in ("label", *FLOWS, *likely)],
                row.get("key") or "",
                [name for name in MODALITIES if row.get(f"has_{name}") == "1"],
                row.get("imagined") or "",  # older files have no such column
            )
            for row in table
        ]
    except (OSError, UserError, csv.Error) as error:
        run.problems.append(f"{path.name} cannot be read: {error}.")
        return None
    good = [row for row in rows if np.isfinite(row[0]).all() and (not classes or are_places(row[0][:3], classes))]
    if len(good) < len(rows) or not rows:
        run.problems.append(f"{path.name}: {len(rows) - len(good)} of {len(rows)} rows are unusable and left out.")
    if not good:
        return None
    numbers, keys, present, imagined = zip(*good, strict=True)
    label, complete, missing, *chances = np.array(numbers, dtype=np.float64).T
    flows = {"complete": complete, "missing": missing}
    halves = [np.stack(part, 1) for part in (chances[: len(classes)], chances[len(classes) :]) if part]
    by_flow = dict(zip(FLOWS, halves, strict=False))
    return Predictions(split, label, flows, list(keys), list(present), list(imagined), classes, by_flow)


def classes_of(columns: Sequence[str]) -> list[str]:
    """Names of the classes in a file of predictions, by its columns FLOW:CLASS; none where it is of numbers."""
    named = [[column.removeprefix(f"{flow}:") for column in columns if column.startswith(f"{flow}:")] for flow in FLOWS]
    return named[0] if named[0] == named[1] and not any(class_problems(named[0])) else []


def are_places(values: Sequence[float], classes: Sequence[str]) -> bool:
    """Whether each is the place of a class."""
    return all(value in range(len(classes)) for value in values)


def can_be_drawn(values: np.ndarray) -> np.ndarray:
    """Whether each is a number of a size whose square a float32 holds, as t-SNE needs."""
    return np.abs(values, dtype=np.float64) < WILDEST


def _read_representations(run: Run, split: str) -> Representations | None:
    path = run.path / f"representations_{split}.safetensors"
    if not path.is_file():
        return None
    try:
        tensors = load(read_bounded(path, MOST_RECORD, LEAVE_OUT))
        complete, missing, label = tensors["complete"], tensors["missing"], tensors["label"]
    except (OSError, UserError, SafetensorError, KeyError, TypeError, ValueError) as error:
        run.problems.append(f"{path.name} cannot be read: {error}.")
        return None
    problem = ""
    if complete.ndim != 2 or complete.shape != missing.shape or label.shape != complete.shape[:1] or not complete.size:
        problem = f"shapes {complete.shape}, {missing.shape}, {label.shape} do not fit together"
    elif len(label) > MOST_CLIPS:
        problem = f"{len(label)} clips are too many to draw and left out"
    elif len(label) * complete.size > MOST_COMPARED:
        problem = f"{complete.shape[1]} values a clip are too many to compare and left out"
    if problem:
        run.problems.append(f"{path.name}: {problem}.")
        return None
    good = can_be_drawn(complete).all(1) & can_be_drawn(missing).all(1) & can_be_drawn(label)
    if not good.all():
        run.problems.append(f"{path.name}: {int((~good).sum())} of {len(good)} clips are not finite and left out.")
    if not good.any():
        return None
    refined = {flow: tensors[f"refine_{flow}"] for flow in FLOWS if f"refine_{flow}" in tensors}
    shapes = {values.shape for values in refined.values()}
    fits = len(shapes) == 1 and shapes <= {(len(label), len(MODALITIES), k) for k in (1, 2, 3)}
    if refined and not (fits and all(can_be_drawn(values[good]).all() for values in refined.values())):
        run.problems.append(f"{path.name}: what VGMR says of the clips is damaged and left out.")
        refined = {}
    values = {flow: values[good] for flow, values in refined.items()}
    stand_in, lacks = tensors.get("stand_in"), tensors.get("lacks")
    if stand_in is not None or lacks is not None:
        if (
            stand_in is None
            or lacks is None
            or stand_in.ndim != 3
            or stand_in.shape[:2] != (len(label), 3)
            or lacks.shape != label.shape
            or not stand_in.size
            or len(label) * stand_in.size > 3 * MOST_COMPARED
            or not can_be_drawn(stand_in).all()
            or not np.isin(lacks, (-1, 0, 1, 2)).all()
        ):
            run.problems.append(f"{path.name}: what is imagined of the clips is damaged and left out.")
            stand_in = lacks = None
        else:
            stand_in, lacks = stand_in[good], lacks[good].astype(int)
    return Representations(split, complete[good], missing[good], label[good], values, stand_in, lacks)


def _read_attention(run: Run, split: str) -> TokenWeights | None:
    path = run.path / f"attention_{split}.safetensors"
    if not path.is_file():
        return None
    try:
        tensors = load(read_bounded(path, MOST_RECORD, LEAVE_OUT))
        targets, (seconds,) = tensors.pop("targets").tolist(), tensors.pop("frame_seconds").tolist()
        clips = {name.removeprefix("clip/"): weights for name, weights in tensors.items()}
        fits = 0 < len(targets) <= len(MODALITIES) and set(targets) <= set(range(len(MODALITIES)))
        fits = fits and all(
            weights.ndim == 3 and 0 < weights.shape[0] <= MOST_LAYERS
            and weights.shape[1] == len(targets) and weights.shape[2] > 1
            # of rows that sum to 1; fp16 rounds each of many small numbers
            and np.allclose(weights.sum(2, dtype=np.float64), 1, atol=0.05) and (weights >= 0).all()
            for weights in clips.values()
        )  # fmt: skip
        if not fits or not 0 <= seconds < 1:
            raise ValueError("it holds no weights")
        return TokenWeights([MODALITIES[target] for target in targets], seconds, clips)
    except (OSError, UserError, SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:
        run.problems.append(f"{path.name} cannot be read: {error}.")
        return None


def _read_robustness(run: Run, split: str) -> Robustness | None:
    name = f"robustness_{split}.json"
    content = _mapping(run, name, json.loads)
    try:
        return Robustness.model_validate(content) if content else None
    except ValidationError:
        run.problems.append(f"{name} is damaged and was left out.")
        return None


def _mapping(run: Run, name: str, parse: Any) -> dict[str, Any]:
    """A JSON or YAML object, {} when the file is absent or damaged (then named in `problems`)."""
    path = run.path / name
    if not path.is_file():
        return {}
    try:
        content = parse(read_bounded(path, MOST_RECORD, LEAVE_OUT).decode())
        if deeper(content, MOST_DEPTH):
            content = None
    except (OSError, UserError, ValueError, yaml.YAMLError, RecursionError):
        content = None
    if isinstance(content, dict):
        return content
    run.problems.append(f"{name} is damaged and was left out.")
    return {}


def _load_yaml(text: str) -> Any:
    if len(text) > MOST_YAML:
        raise ValueError("too long")
    check_yaml(text)
    return yaml.safe_load(text)


def deeper(content: Any, depth: int) -> bool:
    """Whether mappings and lists are nested more than `depth` deep."""
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return bool(inner) and (depth == 0 or any(deeper(part, depth - 1) for part in inner))
