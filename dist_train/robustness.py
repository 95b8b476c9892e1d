"""How a trained model bears it when modalities are missing or noisy: the curves the field reports.

Predictions of a clip do not depend on its batch, so what happens when a share of the clips lacks a modality follows
from two predictions of each clip, with and without. Seven patterns of what is there are therefore run once, and all
missing-rate curves are drawn from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dist_train.batch import Collator
from dist_train.build import open_split, to_device
from dist_train.costs import clip_costs
from dist_train.evaluate import load_trained
from dist_train.fusion import Fused
from dist_train.metrics import Metrics, task_floors, task_metrics
from dist_train.missing import TEXT, Streams, without
from dist_train.model import DoubleFlow
from dist_train.names import FLOWS, MODALITIES
from dist_train.packed import TextStates
from dist_train.recipe import Recipe
from dist_train.robustness_record import Robustness
from dist_train.run_directory import RunDirectory
from dist_train.task import Kind
from sharding.budget import Cost
from sharding.collectives import device, gather_objects, together
from sharding.errors import UserError
from sharding.heartbeat import beat
from sharding.order import EpochPlan
from sharding.stream import ShardedSplit, stream

# What is there, from everything to one modality alone.
PATTERNS = {
    "+".join(name for name, has in zip(MODALITIES, there, strict=True) if has): there
    for there in sorted(product((True, False), repeat=3), key=sum, reverse=True)
    if any(there)
}
EVERYTHING = "+".join(MODALITIES)
RATES = tuple(step / 10 for step in range(11))
DRAWS = 10  # of the clips that lack the modality; fixed seeds
RATIOS = (0.1, 0.3, 0.5, 1.0)  # of a clip's steps that are replaced by noise
WEIGHTS = (0.25, 0.5, 1.0, 2.0)  # of noise added to all steps, in units of the clip's own root mean square


class Noise(NamedTuple):
    """Gaussian noise in one modality: replaces a share of the steps (`ratio`) or is added to all of them (`weight`)."""

    modality: int
    kind: str
    size: float

    @property
    def name(self) -> str:
        """As in the result's keys."""
        return f"{MODALITIES[self.modality]} {self.kind} {self.size:g}"


NOISES = [
    Noise(modality, kind, size)
    for modality in range(3)
    for kind, sizes in (("ratio", RATIOS), ("weight", WEIGHTS))
    for size in sizes
]


def noisy(stream: TextStates, noise: Noise, index: Sequence[int], seed: int = 0) -> TextStates:
    """The stream with noise of the clip's own root mean square, a function of seed, modality and clip alone.

    Args:
        index: position of each clip in its split.
    """
    states = stream.states.clone()
    for row, clip in enumerate(index):
        draw = np.random.default_rng([seed, noise.modality, clip])
        steps = stream.mask[row].nonzero()[:, 0]
        own = states[row, steps]
        size = own.float().square().mean().sqrt()
        gaussian = torch.from_numpy(draw.standard_normal(tuple(own.shape), dtype=np.float32)).to(own.device) * size
        if noise.kind == "ratio":
            hit = torch.from_numpy(draw.permutation(len(steps)) < round(noise.size * len(steps))).to(own.device)
            own = torch.where(hit[:, None], gaussian.to(own.dtype), own)
        else:
            own = own + (noise.size * gaussian).to(own.dtype)
        states[row, steps] = own
    return TextStates(states, stream.mask)


class Outcomes(NamedTuple):
    """Predictions of n clips, in key order, on all ranks. predicted: by pattern, and by noise and flow (`NOISE/flow`),
    numbers [n] or logits [n, C]; values: of a model with VGMR, by condition, [n, 3, k + 1]: g and the mean of p as far
    as it has them, and the gate.
    """

    label: np.ndarray
    predicted: dict[str, np.ndarray]
    values: dict[str, np.ndarray]


@torch.no_grad()
def outcomes(
    model: DoubleFlow,
    split: ShardedSplit,
    collate: Collator,
    *,
    batch: int,
    workers: int,
    costs: tuple[Cost, ...] = (),
) -> Outcomes:
    """Runs a split under every pattern and noise; what hears and reads runs once per clip (collective)."""
    plan = EpochPlan(len(split), batch, 1, dist.get_world_size(), seed=0, epoch=0, shuffle=False, costs=costs)
    batches = stream(split, plan, dist.get_rank(), collate, workers=workers)
    found: dict[int, tuple[float, dict[str, np.ndarray], dict[str, np.ndarray]]] = {}
    for _ in range(sum(plan.micro_steps(step) for step in range(plan.steps))):
        beat("robustness: data")
        micro = together(lambda: next(batches))
        beat("robustness")
        micro.pop("set_aside")
        micro["dropped"] = torch.zeros(len(micro["label"]), 3, dtype=torch.bool)
        micro["dropped"][:, TEXT] = True  # imagine the text of every clip
        predicted, values = under_all(model, to_device(micro, device()), micro["index"].tolist())
        for row in np.flatnonzero(micro["real"].numpy()):
            found[int(micro["index"][row])] = (
                float(micro["label"][row]),
                {name: column[row] for name, column in predicted.items()},
                {name: column[row] for name, column in values.items()},
            )
    merged: dict[int, Any] = {}
    for part in gather_objects(found):
        merged |= part
    if not merged:
        raise UserError(f"split {split.split}", "has no clip that could be read", "Run `dist-train shards verify`.")
    rows = [merged[index] for index in sorted(merged)]
    return Outcomes(
        np.array([row[0] for row in rows]),
        {name: np.array([row[1][name] for row in rows]) for name in rows[0][1]},
        {name: np.stack([row[2][name] for row in rows]) for name in rows[0][2]},
    )


def under_all(
    model: DoubleFlow, batch: Any, index: Sequence[int]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Predictions and values of a micro-batch by condition."""
    whole, simulated, *_, available = model.streams(batch)
    text = batch["dropped"]
    predicted: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}

    def fuse(whole: Streams, simulated: TextStates, dropped: Tensor) -> Fused:
        return model.fusion(whole, without(whole, simulated, dropped), dropped, available=available)

    for name, there in PATTERNS.items():
        dropped = ~torch.tensor(there, device=text.device).expand(len(text), 3)
        fused = fuse(whole, simulated, dropped)
        predicted[name] = fused.complete.prediction if all(there) else fused.missing.prediction
        if all(there) and "gate/complete" in fused.notes:
            values["clean"] = values_of(fused)
    for noise in NOISES:
        streams = list(whole)
        streams[noise.modality] = noisy(whole[noise.modality], noise, index)
        imagined = noisy(simulated, noise, index) if noise.modality == TEXT else simulated
        fused = fuse(Streams(*streams), imagined, text)
        predicted[f"{noise.name}/complete"] = fused.complete.prediction
        predicted[f"{noise.name}/missing"] = fused.missing.prediction
        if "gate/complete" in fused.notes:
            values[noise.name] = values_of(fused)
    return tuple(  # type: ignore[return-value]
        {name: value.float().cpu().numpy() for name, value in part.items()} for part in (predicted, values)
    )


def values_of(fused: Fused) -> Tensor:
    """[B, 3, k + 1] of the complete flow."""
    return torch.cat([fused.notes["estimates/complete"], fused.notes["gate/complete"][..., None]], 2)


def missing_rates(found: Outcomes) -> dict[str, list[dict[str, Any]]]:
    """Metrics over the share of clips that lack a modality, for each modality and for one drawn per clip (`random`).

    Mean and standard deviation over fixed draws of the clips.
    """
    curves: dict[str, list[dict[str, Any]]] = {}
    count = len(found.label)
    shape = (count,) + (1,) * (found.predicted[EVERYTHING].ndim - 1)  # logits are chosen by clip
    lacking = ["+".join(name for name in MODALITIES if name != gone) for gone in MODALITIES]
    for number, modality in enumerate((*MODALITIES, "random")):
        curve = []
        for rate in RATES:
            drawn = []
            for seed in range(DRAWS):
                draw = np.random.default_rng([seed, number])
                which = np.full(count, number) if modality != "random" else draw.integers(3, size=count)
                lacks = draw.permutation(count) < round(rate * count)
                without_it = np.choose(which.reshape(shape), [found.predicted[name] for name in lacking])
                left = np.where(lacks.reshape(shape), without_it, found.predicted[EVERYTHING])
                drawn.append(task_metrics(left, found.label))
            curve.append({"rate": rate, **spread(drawn)})
        curves[modality] = curve
    return curves


def spread(drawn: Sequence[Metrics]) -> dict[str, float | None]:
    """Mean of each metric, and `NAME_std`."""
    merged: dict[str, float | None] = {}
    for name in drawn[0]:
        values = [metrics[name] for metrics in drawn]
        known = None if any(value is None for value in values) else np.array(values, float)
        merged[name] = None if known is None else float(known.mean())
        merged[f"{name}_std"] = None if known is None else float(known.std(ddof=1))
    return merged


def summarise(found: Outcomes, train_labels: np.ndarray, split: str, kind: Kind = "regression") -> Robustness:
    """Metrics and curves of the predictions.

    Args:
        train_labels: for the floor.
    """
    noise: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for one in NOISES:
        flows = {flow: task_metrics(found.predicted[f"{one.name}/{flow}"], found.label) for flow in FLOWS}
        place = noise.setdefault(MODALITIES[one.modality], {}).setdefault(one.kind, [])
        place.append({"size": one.size, **flows})
    return Robustness.model_validate(
        {
            "kind": kind,
            "split": split,
            "clips": len(found.label),
            "draws": DRAWS,
            "floor": task_floors(found.predicted[EVERYTHING], train_labels, found.label),
            "patterns": {name: task_metrics(found.predicted[name], found.label) for name in PATTERNS},
            "missing_rate": missing_rates(found),
            "noise": noise,
            "values": {name: values.mean(0).tolist() for name, values in found.values.items()},
        }
    )


def evaluate_robustness(
    run: RunDirectory, recipe: Recipe, checkpoint: Path, split_name: str, *, accept_other_base: bool = False
) -> Robustness:
    """Runs a checkpoint under all conditions and writes robustness_SPLIT.json; returns what is in it (collective)."""
    model, collate = load_trained(run, recipe, checkpoint, accept_other_base=accept_other_base)
    assert isinstance(model, DoubleFlow)
    split = open_split(recipe, split_name)
    found = outcomes(
        model,
        split,
        collate,
        batch=recipe.data.evaluation_batch,
        workers=recipe.data.workers,
        costs=clip_costs(recipe, split),
    )
    result = summarise(found, open_split(recipe, "train").labels, split_name, recipe.task.kind)
    if dist.get_rank() == 0:
        (run.path / f"robustness_{split_name}.json").write_text(result.model_dump_json(indent=1) + "\n")
    return result
