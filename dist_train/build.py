"""From a recipe to the things a run is made of: dataset, tokenizer, collator, model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dist_train.adapters import cast_projections
from dist_train.batch import Collator, DataSettings
from dist_train.features import differences, pinned
from dist_train.llm import load_tokenizer
from dist_train.model import DoubleFlow
from dist_train.optimizer import build_optimizer
from dist_train.recipe import Recipe, Widths
from dist_train.tokenizer import train_tokenizer
from sharding.budget import Cost
from sharding.errors import UserError, UserErrors
from sharding.mix import MixedSplit, Part, mix_info
from sharding.order import EpochPlan
from sharding.shards import load_info
from sharding.shuffle import Source
from sharding.stream import Contents, ShardedSplit
from sharding.zero import build_engine


def fit_to_dataset(recipe: Recipe) -> Recipe:
    """The recipe with the dataset's feature widths and classes filled in.

    Raises:
        UserError: a stream the recipe reads is not in the dataset at all, or its labels are not what the task asks for.
    """
    contents = contents_of(recipe.data)
    check_features(recipe.data, contents)
    dims = contents.dims
    wants_waveform = recipe.audio.input == "waveform"
    if dims.audio is not None and (dims.audio == "waveform") != wants_waveform:
        has = "waveforms" if dims.audio == "waveform" else "audio features"
        raise UserError(
            "audio.input",
            f"is {recipe.audio.input}, but {recipe.data.name} has {has}",
            f"Write audio.input: {'waveform' if dims.audio == 'waveform' else 'features'}.",
        )
    # A corpus of audio and vision alone is one, too; that nothing was learnt from text is said at the end.
    textless = not recipe.reads_language_model and recipe.simulation.rollout == "none"
    if recipe.text.input == "features" and dims.text is None and not textless:
        raise UserError("text.input", f"is features, but {recipe.data.name} has none", "Write text.input: transcript.")
    if recipe.simulation.rollout == "features" and dims.simulated is None:
        problem = f"is features, but {recipe.data.name} has no simulated text"
        raise UserError("simulation.rollout", problem, "Make it with `dist-train extract`, or write another rollout.")
    if recipe.simulation.rollout == "features" and dims.simulated != dims.text:
        problem = f"is features, but {recipe.data.name} has it of width {dims.simulated}, real text of {dims.text}"
        raise UserError("simulation.rollout", problem, "Both enter the same layer: take them from one model.")
    widths = Widths(
        audio=dims.audio if isinstance(dims.audio, int) else 1,
        text=dims.text or 1,
        simulated=dims.simulated or 1,
        vision=dims.vision or 1,
    )
    task = recipe.task.fitted(contents.classes, recipe.data.name)
    changes: dict[str, Any] = {"widths": widths, "task": task}
    if contents.features is not None:
        changes["data"] = recipe.data.model_copy(update={"features": pinned(contents.features)})
    return recipe.model_copy(update=changes)


def check_features(data: DataSettings, contents: Contents) -> None:
    """Refuses features that were made in another way than the recipe asks for.

    Raises:
        UserErrors: each entry that differs.
    """
    if data.features is not None:
        remedy = "Extract them anew (`dist-train extract`), or train a new run on these."
        wrong = differences(data.features, contents.features, "data.features", data.name, remedy)
        if wrong:
            raise UserErrors(wrong)


def parts_of(data: DataSettings) -> list[Part]:
    """The datasets of a mix."""
    return sorted(Part(source.called, Path(source.path), source.weight) for source in data.sources or ())


def contents_of(data: DataSettings) -> Contents:
    """What dataset.json tells of the recipe's dataset or datasets.

    Raises:
        UserError, UserErrors: one cannot be opened, or they do not fit together.
    """
    return load_info(Path(data.path)) if data.path is not None else mix_info(parts_of(data))


def open_split(recipe: Recipe, name: str) -> ShardedSplit:
    """One split of the recipe's dataset, or of its mix; its labels are what the recipe's task predicts.

    Raises:
        UserError, UserErrors: it cannot be opened, holds other features than the recipe asks for, or labels that are no
            class of the task.
    """
    data = recipe.data
    if data.path is not None:
        split = ShardedSplit(Path(data.path), name, data.on_bad_sample)
    else:
        split = MixedSplit(parts_of(data), name, data.on_bad_sample)
    check_features(data, split.info)
    task = recipe.task.fitted(split.info.classes, data.name)
    split.labels = task.checked(split.labels, split.keys, f"{data.name}, split {name}")
    return split


def open_splits(recipe: Recipe) -> dict[str, ShardedSplit]:
    """All splits that a training reads, opened before it begins: a test split is wanted only at its end.

    Raises:
        UserError, UserErrors: see `open_split`; there must be "train" and "valid".
    """
    splits = {name: open_split(recipe, name) for name in ("train", "valid")}
    return splits | ({"test": open_split(recipe, "test")} if "test" in splits["train"].info.splits else {})


def training_plan(
    recipe: Recipe, sources: tuple[Source, ...], world: int, epoch: int, costs: tuple[Cost, ...] = ()
) -> EpochPlan:
    """Order and cut of a training epoch.

    Args:
        sources: of the training split.
        world: ranks.
        costs: what a rank may hold at once (`costs.clip_costs`).
    """
    return EpochPlan(
        sum(source.samples for source in sources),
        recipe.data.batch,
        recipe.training.accumulation,
        world,
        recipe.seed,
        epoch,
        costs=costs,
        sources=sources,
        window=recipe.data.order_window,
    )


def prepare_tokenizer(recipe: Recipe, directory: Path) -> None:
    """Puts the run's tokenizer into `directory`: the named one, or one trained on the training transcripts (one
    process calls this). None where no language model is read.
    """
    if not recipe.reads_language_model:
        return
    name = recipe.text.tokenizer or recipe.text.pretrained
    if name is not None:
        where = "text.tokenizer" if recipe.text.tokenizer else "text.pretrained"
        tokenizer: PreTrainedTokenizerBase = load_tokenizer(name, where)
    else:
        split = open_split(recipe, "train")
        texts = (split[int(i)]["text"] for i in np.flatnonzero(split.columns.text_characters.filled()))
        tokenizer = train_tokenizer((text for text in texts if text), recipe.text.vocabulary)
    shutil.rmtree(directory, ignore_errors=True)
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:  # the tokenizers package raises nothing more special, e.g. where the disk is full
        raise UserError(
            str(directory), f"cannot be written ({error})", "Free space, or give another --output."
        ) from None


def kept_tokenizer(recipe: Recipe, directory: Path) -> PreTrainedTokenizerBase | None:
    """What `prepare_tokenizer` has put there."""
    return load_tokenizer(str(directory)) if recipe.reads_language_model else None


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, *, resumed: bool = False) -> DoubleFlow:
    """The model in the recipe's precision, initialised from its seed alike on every rank.

    Pretrained parts are loaded in that precision, so only what is new is cast here.

    Args:
        resumed: a checkpoint will fill what is trained; files that it once started from are not read.
    """
    if resumed:
        recipe = recipe.model_copy(deep=True)
        recipe.simulation.projector = None
    torch.manual_seed(recipe.seed)
    model = DoubleFlow(recipe, tokenizer)
    for parameter in model.parameters():  # buffers such as rotary frequencies stay fp32
        if parameter.is_floating_point() and parameter.dtype != recipe.dtype:  # quantised weights are integers
            parameter.data = parameter.data.to(recipe.dtype)
    cast_projections(model, recipe.dtype)
    return model


def build_training(recipe: Recipe, model: DoubleFlow, *, micro_batch: int, accumulation: int = 1) -> Any:
    """The DeepSpeed engine around the recipe's model, with its optimizer and ZeRO settings (see sharding.zero)."""
    return build_engine(
        model,
        build_optimizer(recipe.optimizer, [parameter for parameter in model.parameters() if parameter.requires_grad]),
        recipe.zero,
        micro_batch=micro_batch,
        accumulation=accumulation,
        clip_norm=recipe.optimizer.clip_norm,
        bf16=recipe.precision == "bf16",
    )


def build_collator(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None, model: DoubleFlow) -> Collator:
    """The collator that fits the model's inputs."""
    return Collator(
        tokenizer,
        recipe.data,
        recipe.audio,
        recipe.text,
        minimum_audio=model.audio.minimum_samples,
        widths=recipe.widths.model_dump(),
        simulated=recipe.simulation.rollout == "features",
        missing=recipe.missing,
        seed=recipe.seed,
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch's tensors on the device."""
    return {
        key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value for key, value in batch.items()
    }
