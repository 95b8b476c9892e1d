"""What a conversion is made of: what was read, what helps to understand it, and what is to be written."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dist_train.llm import load_tokenizer
from dist_train.recipe import Recipe, load_recipe
from dist_train.run_directory import RunDirectory
from sharding.errors import UserError
from sharding.portable import Portable
from tools.convert.held import Held, Tensors

Part = Literal["llm", "audio"]
PREFIX: dict[Part, str] = {"llm": "llm.causal.", "audio": "audio.wavlm."}  # of their parameters in our model
KEY: dict[Part, str] = {"llm": "text", "audio": "audio"}  # of the recipe
CALLED: dict[Part, str] = {"llm": "language model", "audio": "WavLM"}


@dataclass(frozen=True)
class Source:
    """What was read, by the names of our model.

    Args:
        held: weights, moments, state.
        files: what was read, for the checksums.
        complete: it holds all that a run trains.
        models: configuration of each part that is whole; of the others `held` has only what is trained.
        adapters: PEFT's configuration of the adapters, where the format has one.
        tokenizer: of the language model, where the format has one.
        left_out: what the format holds and `held` does not.
        base: folder of the frozen weights, where the format names one.
        checksums: SHA-256 of those files that were compared with one already.
    """

    held: Held
    files: list[Path]
    complete: bool = False
    models: dict[Part, PretrainedConfig] = field(default_factory=dict)
    adapters: dict[Part, Any] = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None
    left_out: list[str] = field(default_factory=list)
    base: Path | None = None
    checksums: dict[Path, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outgoing:
    """What is to be written.

    Args:
        tensors: by the names of the format.
        save: writes them into a folder that is there and empty.
        reopen: reads them again, as the users of the format do.
        library: what reads them there, for the message.
        files: names of what else is written.
        left_out: what `Source` holds and the format does not.
        notes: what a user should know of the result.
        base: folder of the frozen weights that it contains or belongs to.
    """

    tensors: Tensors
    save: Callable[[Path, Tensors], None]
    reopen: Callable[[Path], Iterable[tuple[str, Tensor]]]
    library: str
    files: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    base: Path | None = None


def check_encoder(source: Source, part: Part) -> None:
    """Refuses the audio part of a run that hears with another encoder than WavLM.

    Raises:
        UserError: it does.
    """
    heard = {name.split(".")[1] for name in source.held.weights.shapes if name.startswith("audio.")}
    other = ", ".join(sorted(heard - {PREFIX["audio"].split(".")[1]}))
    if part == "audio" and other:
        raise UserError("SRC", f"hears with {other}; only WavLM can be converted", "Choose another format.")


class Run:
    """A run directory: its recipe, tokenizer and best checkpoint.

    Raises:
        UserError: it is none.
    """

    def __init__(self, path: Path) -> None:
        self.directory = RunDirectory(path)
        self.directory.open()
        self.recipe: Recipe = load_recipe(self.directory.recipe)

    @property
    def path(self) -> Path:
        """The directory."""
        return self.directory.path

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The run's tokenizer."""
        return load_tokenizer(str(self.directory.tokenizer))

    def checkpoint(self) -> Path:
        """Its best checkpoint.

        Raises:
            UserError: it has none.
        """
        for name in ("best", "last"):
            if (self.directory.checkpoints / name).is_dir():
                return (self.directory.checkpoints / name).resolve()
        raise UserError(str(self.path), "has saved no checkpoint", "Give a run that has.")

    def best(self) -> Portable:
        """The same, opened; the files' sizes are compared, not their checksums."""
        return Portable(self.checkpoint(), checksums=False)


@dataclass(frozen=True)
class Context:
    """What the command says beside source and destination.

    Args:
        run: `--run`, or the run that the source belongs to.
        base: `--base`.
        dtype: `--dtype`; None: what the format writes by default.
    """

    run: Run | None = None
    base: Path | None = None
    dtype: torch.dtype | None = None

    def needs_run(self, what: str) -> Run:
        """The run.

        Raises:
            UserError: there is none.
        """
        if self.run is None:
            raise UserError("--run", f"is needed: {what}", "Give the --output of `dist-train train`.")
        return self.run


def select(tensors: Tensors, names: dict[str, str], dtype: torch.dtype | None = None) -> Tensors:
    """Some of the tensors, under other names.

    Args:
        names: new name → name in `tensors`.
        dtype: of floating-point tensors; None leaves each its own.
    """
    kinds = {new: tensors.dtypes[old] for new, old in names.items()}
    if dtype is not None:
        kinds = {new: dtype if kind.is_floating_point else kind for new, kind in kinds.items()}
    return Tensors(
        {new: tensors.shapes[old] for new, old in names.items()},
        kinds,
        lambda new: tensors.read(names[new]).to(kinds[new]),
    )


def together(*several: Tensors) -> Tensors:
    """All of them; a later one replaces an earlier one of the same name."""
    owner = {name: one for one in several for name in one.shapes}
    return Tensors(
        {name: one.shapes[name] for name, one in owner.items()},
        {name: one.dtypes[name] for name, one in owner.items()},
        lambda name: owner[name].read(name),
    )


def in_memory(tensors: dict[str, Tensor]) -> Tensors:
    """Tensors at hand."""
    return Tensors(
        {name: list(x.shape) for name, x in tensors.items()},
        {name: x.dtype for name, x in tensors.items()},
        lambda name: tensors[name],
    )


def others(source: Source, taken: Iterable[str]) -> list[str]:
    """What of a source is not written, in words: weights by part, and the optimizer's moments."""
    taken = set(taken)
    counts: dict[str, int] = {}
    for name in source.held.weights.shapes:
        if name not in taken:
            part = name.split(".")[0]
            counts[part] = counts.get(part, 0) + 1
    left = [f"{count} weights of {part}: the format has no place for them" for part, count in counts.items()]
    if source.held.moments.shapes:
        left.append("the optimizer's moments: the format has no place for them")
    return source.left_out + left
