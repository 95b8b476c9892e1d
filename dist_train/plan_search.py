"""Which ZeRO stage and how many micro-steps fit a recipe best, why others do not, and where more GPUs stop helping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dist_train.plan import Candidate, Plan, Planner, Prediction, Scale, plan_as_is, predict_epoch
from dist_train.plan_corpus import Corpus, Load, corpus_of, load_of
from dist_train.plan_features import caching
from dist_train.recipe import Recipe
from sharding.hardware import GIB, Hardware
from sharding.zero import ZeroSettings

STAGES: tuple[Any, ...] = (0, 1, 2, 3)
AS_FAST = 1.03  # times the fastest that counts as equally fast: then less memory decides
SAFE = 0.9  # share of what would fit that a budget is set to
WELL = 0.5  # efficiency below which more GPUs are called a waste


def make_plan(recipe: Recipe, hardware: Hardware, nodes: int, per_node: int) -> Plan:
    """The recipe as it is, its alternatives, and larger worlds.

    Raises:
        UserError: the recipe's models or data do not allow a plan.
    """
    recipe, corpus = corpus_of(recipe)
    planner = Planner(recipe, None, hardware, nodes, per_node)
    load = load_of(recipe, corpus, planner.world)
    plan = plan_as_is(planner, corpus, load)
    found = alternatives(planner, recipe, corpus)
    candidates, best = judge(found, hardware, recipe.zero.stage)
    scaling = scale(planner, recipe, corpus, plan.predicted)
    notes = [*plan.notes, *room(load, plan.predicted, hardware), *limits(recipe, plan.predicted, scaling)]
    notes += caching(planner, corpus, plan.predicted, load.steps)
    return plan.model_copy(update={"candidates": candidates, "best": best, "scaling": scaling, "notes": notes})


def alternatives(planner: Planner, recipe: Recipe, corpus: Corpus) -> list[Prediction]:
    """Every stage with the recipe's micro-steps and with one; and with more of them until one fits."""
    found: list[Prediction] = []
    own, most = recipe.training.accumulation, max(1, recipe.data.batch // planner.world)
    numbers = sorted({1, own})
    while numbers:
        for accumulation in numbers:
            training = recipe.training.model_copy(update={"accumulation": accumulation})
            load = load_of(recipe.model_copy(update={"training": training}), corpus, planner.world)
            found += [predict_epoch(planner, load, zero) for zero in stages(recipe)]
        more = 2 * numbers[-1]
        enough = more > most or any(fits(prediction, planner.hardware) for prediction in found)
        numbers = [] if enough else [more]
    return found


def stages(recipe: Recipe) -> list[ZeroSettings]:
    """The stages under which the recipe may run."""
    int8 = "int8" in (recipe.text.quantisation, recipe.audio.quantisation)
    allowed = [stage for stage in STAGES if stage < 3 or not int8 or recipe.zero.replicate_int8]
    plain: dict[str, Any] = {"offload_parameters": "none"}
    return [
        recipe.zero.model_copy(
            update={"stage": stage}
            | (plain if stage < 3 else {})
            | ({"offload_optimizer": "none"} if stage == 0 else {})
        )
        for stage in allowed
    ]


def fits(prediction: Prediction, hardware: Hardware) -> bool:
    """Whether it fits the device."""
    return prediction.device_bytes <= hardware.memory


def judge(found: Sequence[Prediction], hardware: Hardware, stage: int) -> tuple[list[Candidate], int | None]:
    """All candidates with a verdict, and which is best: the fastest that fits; among equally fast ones the one that
    needs least; among equals the recipe's own stage.
    """
    possible = [index for index, prediction in enumerate(found) if fits(prediction, hardware)]
    best = None
    if possible:
        fastest = min(found[index].seconds["step"] for index in possible)
        equal = [index for index in possible if found[index].seconds["step"] <= AS_FAST * fastest]
        best = min(equal, key=lambda i: (round(found[i].device_bytes / GIB, 1), abs(found[i].zero_stage - stage)))
    candidates = []
    for index, prediction in enumerate(found):
        chosen = None if best is None else found[best]
        verdict = "best" if index == best else why_not(prediction, chosen, hardware)
        candidates.append(
            Candidate(
                zero_stage=prediction.zero_stage,
                micro_steps=prediction.micro_steps,
                clips=prediction.clips,
                device_bytes=prediction.device_bytes,
                step_seconds=prediction.seconds["step"],
                fits=fits(prediction, hardware),
                verdict=verdict,
            )
        )
    return candidates, best


def why_not(prediction: Prediction, best: Prediction | None, hardware: Hardware) -> str:
    """Why a candidate is not the best."""
    surplus = prediction.device_bytes - hardware.memory
    if surplus > 0:
        name, size = max(prediction.peak_parts.items(), key=lambda part: part[1])
        return f"{surplus / GIB:.1f} GiB too much; most are {name}, {size / GIB:.1f} GiB"
    assert best is not None
    ratio = prediction.seconds["step"] / best.seconds["step"]
    if ratio <= AS_FAST:
        return f"as fast, {max(prediction.device_bytes - best.device_bytes, 0) / GIB:.1f} GiB more"
    if prediction.micro_steps > best.micro_steps:
        return f"{ratio:.2f} × the time: every micro-step but one runs forward twice"
    sent = sum(prediction.wire_bytes.values()) / 1e9
    return f"{ratio:.2f} × the time: {sent:.1f} GB per step go over the wire"


def scale(planner: Planner, recipe: Recipe, corpus: Corpus, here: Prediction) -> list[Scale]:
    """The recipe's global batch on this world, and on two and four times as many nodes."""
    found: list[Scale] = []
    for factor in (1, 2, 4):
        world = factor * planner.world
        if world * recipe.training.accumulation > recipe.data.batch:
            break
        if factor == 1:
            seconds = here.seconds["step"]
        else:
            larger = planner.on(factor * planner.nodes)
            seconds = predict_epoch(larger, load_of(recipe, corpus, world)).seconds["step"]
        first = found[0] if found else None
        efficiency = 1.0 if first is None else first.step_seconds * first.world / (seconds * world)
        found.append(Scale(world=world, clips=recipe.data.batch / world, step_seconds=seconds, efficiency=efficiency))
    return found


def room(load: Load, predicted: Prediction, hardware: Hardware) -> list[str]:
    """How much larger micro-batches may be."""
    activations = sum(size for name, size in predicted.peak_parts.items() if name.startswith("activations"))
    free = hardware.memory - predicted.device_bytes
    growth = SAFE * (1 + free / (activations * (1 + hardware.fragmentation))) if activations else 0.0
    if predicted.peak_moment != "forward and backward" or growth <= 0:
        return []
    told = "leaves" if free >= 0 else "lacks"
    largest = f"The largest micro-batch ({load.seconds:.0f} padded seconds, {load.tokens:.0f} tokens) {told} "
    seconds, tokens = growth * load.seconds, growth * load.tokens
    if seconds < load.longest_seconds or tokens < load.longest_tokens:
        return [
            f"{largest}{abs(free) / GIB:.1f} GiB; no data.budget helps: the longest clip alone takes "
            f"{load.longest_seconds:.0f} seconds and {load.longest_tokens:.0f} tokens (audio.max_seconds bounds it)."
        ]
    also = f", tokens: {tokens:.0f}" if load.tokens else ""  # no language model reads any
    return [f"{largest}{abs(free) / GIB:.1f} GiB; data.budget: {{audio_seconds: {seconds:.0f}{also}}} would fit."]


def limits(recipe: Recipe, predicted: Prediction, scaling: Sequence[Scale]) -> list[str]:
    """Where strong scaling ends, and what costs most."""
    batch, notes = recipe.data.batch, []
    poor = next((entry for entry in scaling if entry.efficiency < WELL), None)
    if poor is not None:
        notes.append(
            f"A global batch of {batch} gives {poor.clips:.1f} clips per GPU on {poor.world} GPUs: "
            f"{poor.efficiency:.0%} of perfect scaling. Strong scaling ends before."
        )
    most = batch // recipe.training.accumulation
    notes.append(f"A global batch of {batch} feeds at most {most} GPUs; more need a larger data.batch.")
    seconds = predicted.seconds
    if seconds["decode"] > 0.3 * seconds["step"]:
        notes.append(
            f"Decoding takes {seconds['decode'] / seconds['step']:.0%} of the step; simulation.rollout: cached with a "
            "longer refresh_epochs, or prefix, spares it."
        )
    return notes
