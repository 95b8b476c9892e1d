"""From samples to a batch of padded tensors, and the settings of the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dist_train.audio import SAMPLE_RATE, AudioSettings
from dist_train.llm import TextSettings
from dist_train.missing import Missing, drop
from dist_train.tokenizer import start_id
from sharding.errors import UserError
from sharding.shards import Features
from sharding.shuffle import Window


class BudgetSettings(BaseModel):
    """Most that one rank holds in one micro-step, so that a long clip cannot exhaust its memory.

    The clips of a step are laid over as many micro-steps as it takes, the same number on all ranks; which clips a step
    trains on does not change, nor (with exact accumulation) its loss.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    audio_seconds: float | None = Field(
        None, gt=0, description="Padded audio: clips × longest clip, in seconds. Default: no limit."
    )
    squared_seconds: float | None = Field(
        None, gt=0, description="WavLM's attention: clips × (longest clip)², in s². Default: no limit."
    )
    tokens: int | None = Field(
        None,
        ge=1,
        description="Positions in the language model's packed pass over both flows; a transcript counts one token "
        "per 3 characters, an answer as many as the transcript. Default: no limit.",
    )


class SourceSettings(BaseModel):
    """One of several datasets that are mixed."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    path: str = Field(description="Directory of shards.")
    weight: float = Field(
        1.0,
        gt=0,
        description="Share of a training epoch, relative to the other weights. An epoch has as many clips as all "
        "training splits together; a dataset that gives more than it has repeats clips, one that gives less goes on "
        "with the others in the next epoch, so that all its clips are visited equally often.",
    )
    name: str | None = Field(
        None, pattern="^[^/]+$", description="Stands before its keys: NAME/KEY. Default: the directory's name."
    )

    @property
    def called(self) -> str:
        """`name` or its default."""
        return self.name or Path(self.path).resolve().name


class DataSettings(BaseModel):
    """Where the clips are and how they are batched."""

    model_config = ConfigDict(extra="forbid")

    path: str | None = Field(
        None, description="Directory of shards made by `dist-train shards make`. Of several: `data.sources`."
    )
    sources: list[SourceSettings] | None = Field(
        None,
        min_length=1,
        description="Instead of `data.path`: several directories of shards, mixed by weight, e.g. "
        "[{path: data/a, weight: 2}, {path: data/b}]. Validation and test take every clip of all of them once, "
        "unweighted.",
    )
    features: Features | None = Field(
        None,
        description="What extracted features must have been made with, e.g. {simulation: {rollout: generate}}; any "
        "entries of `features` in dataset.json. Filled in when a run starts, so that its checkpoints meet no other "
        "features. Default: whatever they were made with.",
    )
    shuffle: Literal["global", "windowed"] = Field(
        "global",
        description="Order of the training clips, a function of seed and epoch. `global`: any permutation; each clip "
        "is one read at a random place, right for local disks. `windowed`: blocks of neighbours are permuted, then the "
        "clips of some blocks together; bytes are read in the order of the disk, for cold network file systems.",
    )
    window: int = Field(
        4096,
        ge=1,
        description="Shuffle `windowed`: clips that are permuted together. The page cache of a node should hold two "
        "windows.",
    )
    block: int = Field(
        128, ge=1, description="Shuffle `windowed`: clips that follow each other by key and are read in one go."
    )
    batch: int = Field(
        96, ge=2, description="Clips per optimizer step over all ranks (at least 2: RNC compares clips)."
    )
    evaluation_batch: int = Field(96, ge=1, description="Clips per evaluation step over all ranks.")
    budget: BudgetSettings = Field(default_factory=BudgetSettings, description="Most per rank and micro-step.")
    workers: int = Field(1, ge=0, description="Data loading processes per rank.")
    on_bad_sample: Literal["stop", "set_aside"] = Field(
        "stop", description="A damaged or oversized clip stops the run, or is set aside and counted."
    )

    @property
    def name(self) -> str:
        """Where the clips come from, for messages and reports."""
        if self.sources is None:
            return str(self.path)
        total = sum(source.weight for source in self.sources)
        return " + ".join(f"{source.weight / total:.0%} {source.path}" for source in self.sources)

    @property
    def order_window(self) -> Window | None:
        """Of a windowed order."""
        return Window(self.window, self.block) if self.shuffle == "windowed" else None

    def conflicts(self) -> Iterable[UserError]:
        """Fields that are right by themselves and wrong together."""
        if self.path is None and self.sources is None:
            described = DataSettings.model_fields["path"].description
            yield UserError("data.path", "is missing", f"Write data.path: {described}")
        if self.path is not None and self.sources is not None:
            yield UserError("data", "has both path and sources", "Put the path among the sources, or leave one out.")
        if self.shuffle == "windowed" and self.window < self.block:
            yield UserError(
                "data.window",
                f"is {self.window}, less than one data.block of {self.block}",
                f"Write data.window: {32 * self.block}, or a smaller data.block.",
            )
        called = Counter(source.called for source in self.sources or ())
        for name, count in called.items():
            if count > 1:
                yield UserError(
                    "data.sources",
                    f"holds {count} datasets called {name}",
                    "Give all but one another name: of its own.",
                )


class Batch(TypedDict):
    """A micro-batch of B clips. `*_mask` [B, T] is True on real positions; an absent modality has one zero position
    and `*_present` False.
    """

    audio: Tensor  # [B, S] waveform or [B, T, D] features
    audio_mask: Tensor
    audio_present: Tensor  # [B]
    text: Tensor  # [B, L] token ids or [B, L, D] features
    text_mask: Tensor
    text_present: Tensor
    vision: Tensor  # [B, T, D]
    vision_mask: Tensor
    vision_present: Tensor
    label: Tensor  # [B] float32
    real: Tensor  # [B], False on fillers
    index: Tensor  # [B] position in the key-sorted split
    dropped: Tensor  # [B, 3], what the missing flow does without: audio, text, vision
    set_aside: list[str]  # why clips of this batch do not count
    simulated: NotRequired[Tensor]  # [B, N, D] features of the imagined text (rollout `features`)
    simulated_mask: NotRequired[Tensor]
    simulated_present: NotRequired[Tensor]
    answer: NotRequired[Tensor]  # [B, N] token ids the language model has said to a clip (rollout.remember)
    answer_mask: NotRequired[Tensor]  # nothing where it has not been asked yet


class Collator:
    """Pads samples to a Batch and tokenises transcripts, in the data loading process.

    Args:
        tokenizer: None where no transcript is read.
        minimum_audio: shortest audio in samples (or frames); shorter ones are padded with silence to it.
        missing, seed: what the missing flow lacks; drawn as in epoch 0, also where clips are evaluated.
        widths: feature width of each modality, by name.
        simulated: whether the imagined text comes as features.

    Raises:
        UserError: a clip longer than `audio.max_seconds` or `text.max_tokens`, unless bad samples are set aside.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        data: DataSettings,
        audio: AudioSettings,
        text: TextSettings,
        *,
        minimum_audio: int,
        widths: dict[str, int],
        simulated: bool = False,
        missing: Missing = "text",
        seed: int = 0,
    ) -> None:
        self.tokenizer = tokenizer
        self.data, self.audio, self.text = data, audio, text
        self.minimum_audio = minimum_audio
        self.widths, self.simulated = widths, simulated
        self.missing, self.seed = missing, seed

    def __call__(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """samples (contract of sharding.stream) → Batch of CPU tensors."""
        real = [bool(sample["real"]) for sample in samples]
        audio: list[np.ndarray | None] = []
        text: list[np.ndarray | None] = []
        simulated: list[np.ndarray | None] = []
        for row, sample in enumerate(samples):
            tokens, problem = self.tokens(sample), None
            if sample["audio"] is not None and self.audio.input == "waveform":
                seconds = len(sample["audio"]) / SAMPLE_RATE
                if seconds > self.audio.max_seconds:
                    problem = (
                        f"lasts {seconds:.1f} s, more than audio.max_seconds = {self.audio.max_seconds:g}",
                        "audio.max_seconds",
                    )
            if self.text.input == "transcript" and tokens is not None and len(tokens) > self.text.max_tokens:
                problem = (
                    f"has {len(tokens)} tokens, more than text.max_tokens = {self.text.max_tokens}",
                    "text.max_tokens",
                )
            if problem and self.data.on_bad_sample == "stop":
                raise UserError(
                    f"sample {sample['key']}",
                    problem[0],
                    f"Shorten it, raise {problem[1]}, or set data.on_bad_sample: set_aside.",
                )
            if problem:
                if real[row]:  # counted once, by its real row
                    sample["set_aside"] = problem[0]
                real[row] = False
            audio.append(None if problem else sample["audio"])
            text.append(None if problem else tokens)
            simulated.append(sample["simulated"] if self.simulated and not problem else None)
        audio_width = None if self.audio.input == "waveform" else self.widths["audio"]
        text_width = None if self.text.input == "transcript" else self.widths["text"]
        a, am, ap = pad(audio, audio_width, self.minimum_audio)
        bos = 0 if self.tokenizer is None else start_id(self.tokenizer)
        t, tm, tp = pad(text, text_width, 1, fill=bos if text_width is None else 0)
        v, vm, vp = pad([sample["vision"] for sample in samples], self.widths["vision"], 1)
        made = Batch(
            audio=a, audio_mask=am, audio_present=ap,
            text=t.long() if text_width is None else t, text_mask=tm, text_present=tp,
            vision=v, vision_mask=vm, vision_present=vp,
            label=torch.tensor([sample["label"] for sample in samples], dtype=torch.float32),
            real=torch.tensor(real),
            index=torch.tensor([sample["index"] for sample in samples]),
            dropped=torch.empty(0),
            set_aside=[f"{sample['key']}: {sample['set_aside']}" for sample in samples if sample.get("set_aside")],
        )  # fmt: skip
        if self.simulated:
            s, sm, sp = pad(simulated, self.widths["simulated"], 1)
            made |= {"simulated": s, "simulated_mask": sm, "simulated_present": sp}
        drop(made, self.missing, self.seed, epoch=0)
        return made

    def tokens(self, sample: dict[str, Any]) -> np.ndarray | None:
        """Token ids [L] of the transcript, BOS first, or the text features [L, D], or None."""
        if self.text.input == "features":
            return sample["text_features"]
        if sample["text"] is None:
            return None
        assert self.tokenizer is not None
        ids = self.tokenizer(sample["text"], add_special_tokens=False, verbose=False).input_ids
        return np.asarray([start_id(self.tokenizer), *ids])


def pad(
    sequences: Sequence[np.ndarray | None], width: int | None, minimum: int, fill: float = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Right-pads sequences [T] or [T, width] to one length of at least `minimum`; None becomes `minimum`
    positions of `fill`.

    Returns:
        padded [B, T(, width)], mask [B, T] bool, present [B] bool.
    """
    lengths = [minimum if sequence is None else max(len(sequence), minimum) for sequence in sequences]
    length = max(lengths)
    shape = (len(sequences), length) if width is None else (len(sequences), length, width)
    padded = np.full(shape, fill, dtype=np.float32)  # exact for token ids below 2^24
    for row, sequence in enumerate(sequences):
        if sequence is not None:
            padded[row, : len(sequence)] = sequence
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    return torch.from_numpy(padded), mask, torch.tensor([sequence is not None for sequence in sequences])
