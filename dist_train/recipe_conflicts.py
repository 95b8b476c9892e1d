"""Fields of a recipe that are right by themselves and wrong together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dist_train.filterbank import fits_filterbank
from dist_train.llm import text_problems
from dist_train.losses import LossSettings
from dist_train.names import FLOWS
from dist_train.pretrained import make_config
from dist_train.speech_encoders import WAVLM, config_is_wrong, too_long
from sharding.errors import UserError
from sharding.rules import incompatible

if TYPE_CHECKING:
    from dist_train.recipe import Recipe


def conflicts(recipe: Recipe) -> Iterable[UserError]:
    """Fields that are right by themselves and wrong together."""
    yield from recipe.task.conflicts()
    yield from recipe.data.conflicts()
    if recipe.audio.input == "waveform" and (recipe.audio.pretrained is None) == (recipe.audio.config is None):
        yield UserError(
            "audio",
            "needs exactly one of pretrained and config",
            "Write audio.pretrained: microsoft/wavlm-large (or a folder), or audio.config: {…}.",
        )
    yield from text_conflicts(recipe)
    if recipe.audio.config is not None:
        problems = list(config_is_wrong(recipe.audio.config))
        if not problems and recipe.audio.input == "waveform":
            problems += too_long(make_config(recipe.audio.config, WAVLM), recipe.audio.max_seconds)
        yield from problems
        if recipe.audio.start == "filterbank" and not problems and not fits_filterbank(recipe.audio.config):
            yield UserError(
                "audio.start",
                "is filterbank, but audio.config has other convolutions than two of [4·n, 2·n] channels",
                "Write audio.config.conv_dim: [128, 64] for 32 bands and feat_extract_norm: layer, or audio.start: "
                "random.",
            )
    yield from loss_conflicts(recipe)
    yield from imagination_conflicts(recipe)
    yield from incompatible(recipe.cases())


def text_conflicts(recipe: Recipe) -> Iterable[UserError]:
    """The language model against what reads it."""
    given = [name for name in ("pretrained", "config") if getattr(recipe.text, name) is not None]
    if recipe.reads_language_model and len(given) != 1:
        yield UserError(
            "text",
            "needs exactly one of pretrained and config",
            "Write text.pretrained: lmsys/vicuna-7b-v1.5 (or a folder), or text.config: {…}.",
        )
    if not recipe.reads_language_model:
        for name in given:
            yield UserError(
                f"text.{name}",
                f"describes a language model that nothing reads (text.input: {recipe.text.input}, "
                f"simulation.rollout: {recipe.simulation.rollout})",
                "Leave it out.",
            )
        return
    if recipe.simulation.rollout == "features":
        yield UserError(
            "simulation.rollout",
            "is features, but text.input is transcript: real and imagined text must be states of one model",
            "Write text.input: features, or simulation.rollout: generate.",
        )
    if recipe.text.config is not None:
        yield from text_problems(recipe.text.config)
        if recipe.text.tuning == "frozen":
            yield UserError(
                "text.tuning",
                "freezes a language model with random weights, which can tell nothing of a transcript",
                "Write text.tuning: full.",
            )


def loss_conflicts(recipe: Recipe) -> Iterable[UserError]:
    """Losses against what there is to train and to judge by."""
    of, instead = ("mse", "ce") if recipe.task.classifies else ("ce", "mse")
    for flow in FLOWS:
        name = f"{of}_{flow}"
        if getattr(recipe.loss, name) != LossSettings.model_fields[name].default:  # as a resolved recipe writes it
            yield UserError(
                f"loss.{name}",
                f"has no meaning in {recipe.task.kind}",
                f"Leave it out; loss.{instead}_{flow} weighs the predictions here.",
            )
    if not recipe.compares_flows and recipe.loss.asr == 0:
        yield UserError("loss", "gives every term the weight 0", f"Write loss.{instead}_complete: 0.5, or loss.asr: 1.")
    judges = recipe.training.select_on
    if recipe.loss.asr == 0 and judges == "transcription":
        yield UserError(
            "training.select_on", "is transcription, and loss.asr is 0", "Write loss.asr: 1, or select_on: mean."
        )
    if recipe.loss.asr > 0 and not recipe.compares_flows and judges != "transcription":
        yield UserError(
            "training.select_on",
            f"is {judges}, but no loss trains the flows' predictions",
            "Write training.select_on: transcription.",
        )
    if recipe.loss.asr > 0 and recipe.text.input == "features":
        yield UserError("loss.asr", "needs transcripts, and text.input is features", "Write loss.asr: 0.")
    rollout = recipe.simulation.rollout
    if recipe.simulation.projector is not None and not recipe.simulation.imagines:
        yield UserError("simulation.projector", f"is of no use where simulation.rollout is {rollout}", "Leave it out.")
    if recipe.loss.asr > 0 and not recipe.simulation.imagines:
        yield UserError(
            "loss.asr",
            f"has the language model hear the clip, and simulation.rollout is {rollout}",
            "Write simulation.rollout: prefix, or loss.asr: 0.",
        )


def imagination_conflicts(recipe: Recipe) -> Iterable[UserError]:
    """How the missing flow makes up for what it lacks, against what it is made of."""
    rollout = recipe.simulation.rollout
    if recipe.missing in ("audio", "vision") and rollout != "none" and recipe.loss.asr == 0:
        yield UserError(
            "simulation.rollout",
            f"imagines text, which no flow lacks (missing: {recipe.missing})",
            "Write simulation.rollout: none, or missing: random.",
        )
    if recipe.imagination.cmpt:
        if rollout != "none":
            yield UserError(
                "simulation.rollout",
                f"is {rollout}, and imagination: cmpt has proxies in the place of imagined text",
                "Write simulation.rollout: none.",
            )
        if recipe.audio.input == "waveform" and (recipe.audio.config or {}).get("model_type") == "whisper":
            yield UserError(
                "audio.config", "is a Whisper, which takes no proxy tokens", "Use WavLM, HuBERT or wav2vec 2.0."
            )
    if recipe.imagination.kind != "mia" and recipe.fusion.width % recipe.imagination.heads:
        yield UserError(
            "imagination.heads",
            f"is {recipe.imagination.heads}, which does not divide fusion.width = {recipe.fusion.width}",
            "Write a divisor of it.",
        )
