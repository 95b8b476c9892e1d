"""The double flow: Figure 1 of the SDUMC paper (arXiv 2410.15029) on one page."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dist_train.audio import AudioEncoder, AudioFeatures
from dist_train.batch import Batch
from dist_train.cmpt import Available
from dist_train.fusion import FlowOutput, FusionNetwork, FusionWidths
from dist_train.llm import Block, LanguageModel, TextFeatures
from dist_train.missing import TEXT, Streams, lacking_modalities, present_of, present_or_zero, without
from dist_train.packed import TextStates, Tokens
from dist_train.phases import phase
from dist_train.projector import Projector, load_projector
from dist_train.promma import Evaluator
from dist_train.recipe import Recipe


class Flows(NamedTuple):
    """What both flows say of a micro-batch of B clips."""

    complete: FlowOutput
    missing: FlowOutput
    tokens: Tensor
    """[] positions of the language model's packed pass."""
    passages: Tensor
    """[] the same, each times the decoder layers it passes."""
    asr: Tensor | None = None
    """[B, 2] negative log-likelihood of the transcript in nats, and its number of tokens; None without ASR."""
    answers: Tokens | None = None
    """The imagined text, one answer per clip; None where the rollout decodes nothing."""
    notes: Mapping[str, Tensor] = MappingProxyType({})
    """What else the losses need of each clip (`Fused.notes`)."""


class Texts(NamedTuple):
    """Real and simulated text of B clips, and what Flows passes on."""

    real: TextStates
    simulated: TextStates
    tokens: Tensor
    passages: Tensor
    asr: Tensor | None
    answers: Tokens | None


class Inputs(NamedTuple):
    """What fusion reads of B clips: the streams of the complete flow, the imagined text, and what else is said of them.

    notes: `worth`, of ProMMA: [B, 3] the evaluator's logit, whether the clip's text is wanted at all, and whether it is
    imagined.
    """

    whole: Streams
    simulated: TextStates
    texts: Texts
    notes: dict[str, Tensor]
    available: Available


class DoubleFlow(nn.Module):
    """Complete flow (audio, real text, vision) and missing flow over the same clips.

    The missing flow reads imagined text instead of the real, or lacks another modality (recipe: `missing`).

    Every module runs once in the same order for every batch on every rank, also for clips that lack a modality:
    an absent modality is computed on a dummy
    and becomes one zero position, so gradients of different ranks always belong to the same parameters.

    Args:
        recipe: resolved recipe (feature widths filled in).
        tokenizer: of the language model; None where there is none.
    """

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> None:
        super().__init__()
        simulates = recipe.simulation.imagines
        minimum = recipe.simulation.stack_frames if simulates else 1  # frames: one position of imagined text
        self.decodes = recipe.simulation.decodes
        self.transcribes = recipe.loss.asr > 0
        self.compares = recipe.compares_flows
        self.layers = recipe.text.layers
        lacks = lacking_modalities(recipe.missing)
        tokens = len(lacks) if recipe.imagination.cmpt and lacks != ("audio",) else 0
        if recipe.audio.input == "waveform":
            self.audio: AudioEncoder | AudioFeatures = AudioEncoder(
                recipe.audio, minimum_frames=minimum, needs_last=simulates, dtype=recipe.dtype, tokens=tokens
            )
        else:
            self.audio = AudioFeatures(recipe.widths.audio, minimum_frames=minimum)
        self.llm: LanguageModel = None  # type: ignore[assignment]  # of features alone there is none
        self.text_width = recipe.widths.text
        if recipe.reads_language_model:
            assert tokenizer is not None
            self.llm = LanguageModel(
                recipe.text, recipe.simulation, tokenizer, recipe.dtype, transcribes=self.transcribes
            )
            self.text_width = self.llm.width
        linear = recipe.text.input == "features" and self.llm is not None
        self.text_features = TextFeatures(recipe.widths.text, self.text_width) if linear else None
        self.projector = Projector(self.audio.width, self.text_width, recipe.simulation) if simulates else None
        if self.projector is not None and recipe.simulation.projector is not None:
            load_projector(self.projector, recipe.simulation.projector)
        self.fusion = FusionNetwork(
            FusionWidths(audio=self.audio.width, text=self.text_width, vision=recipe.widths.vision),
            recipe.fusion,
            recipe.imagination,
            lacks,
            recipe.refine,
            self.audio.width if tokens and recipe.audio.input == "waveform" else None,
            len(recipe.task.classes),
        )
        self.threshold = recipe.imagination.threshold
        self.evaluator = (
            Evaluator((self.audio.width, recipe.widths.vision), recipe.fusion.width)
            if recipe.imagination.promma and simulates
            else None
        )
        self.fusion.requires_grad_(self.compares)  # in projector pre-training no loss reaches it

    def forward(self, batch: Batch) -> Flows:
        """Batch of B clips → both flows."""
        whole, simulated, texts, judged, available = self.streams(batch)
        if self.training and not self.compares:
            nothing = FlowOutput(*(torch.zeros_like(batch["label"]) for _ in FlowOutput._fields))
            if self.fusion.classifies:
                nothing = nothing._replace(prediction=nothing.prediction[:, None])
            return Flows(nothing, nothing, *texts[2:])
        left = without(whole, simulated, batch["dropped"])
        complete, missing, notes = self.fusion(whole, left, batch["dropped"], batch["label"], available)
        return Flows(complete, missing, *texts[2:], notes={**notes, **judged})

    def streams(self, batch: Batch) -> Inputs:
        """What fusion reads, and what else the language model says."""
        dtype = next(self.fusion.parameters()).dtype
        heard = self.audio(batch["audio"], batch["audio_mask"])
        audio = present_or_zero(heard.stream.to(dtype), heard.mask, batch["audio_present"])
        vision = present_or_zero(batch["vision"].to(dtype), batch["vision_mask"], batch["vision_present"])
        notes: dict[str, Tensor] = {}
        imagines = batch.get("simulated_present", batch["audio_present"])
        if self.evaluator is not None:
            worth = self.evaluator([audio, vision]).float()
            asked = imagines & batch["dropped"][:, TEXT]
            if not self.training:
                imagines = imagines & (worth.sigmoid() >= self.threshold)
            notes = {"worth": torch.stack([worth, asked.float(), (asked & imagines).float()], 1)}
        texts = self.texts(batch, heard.last.to(dtype), heard.mask, imagines)
        whole = Streams(audio, present_or_zero(*texts.real, batch["text_present"]), vision)
        available = Available(heard.proxies, present_of(batch))
        return Inputs(whole, present_or_zero(*texts.simulated, imagines), texts, notes, available)

    def texts(self, batch: Batch, frames: Tensor, mask: Tensor, imagines: Tensor) -> Texts:
        """Real and simulated text of each clip, out of one pass of the language model.

        The complete flow and ASR read the transcript in segments of their own: the missing flow cannot see it.

        Args:
            imagines: bool [B], clips whose text is imagined if they lack it.
        """
        if self.llm is None:
            return stored_texts(batch, frames, self.text_width)
        flows = self.compares or not self.training
        text = Tokens(batch["text"], batch["text_mask"])
        audio = None if self.projector is None else self.projector(frames, mask)
        wanted = batch["audio_present"] & batch["real"]
        whole = wanted & batch["text_present"]
        wanted = wanted & batch["dropped"][:, TEXT] & imagines
        blocks: dict[str, Block] = {}
        answers = said = None
        if flows and self.text_features is None:
            blocks["real"] = Block(None, text)
        if self.transcribes and audio is not None:
            said = self.llm.transcript(text, whole)
            blocks["spoken"] = self.llm.question(audio, said, whole)
        if flows and audio is not None:
            if self.decodes:
                known = Tokens(batch["answer"], batch["answer_mask"]) if "answer" in batch else None
                with phase("rollout"):
                    answers = self.llm.answers(audio, wanted, known)
            blocks["simulated"] = self.llm.question(audio, answers, wanted)._replace(whole_way=False)
        read = dict(zip(blocks, self.llm.read(list(blocks.values())), strict=True)) if blocks else {}
        real = simulated = TextStates(frames.new_zeros(len(mask), 1, self.llm.width), torch.ones_like(mask[:, :1]))
        if "real" in read:
            real = read["real"].last(self.layers)
        elif self.text_features is not None:
            real = self.text_features(*text)
        if "simulated" in read:
            simulated = read["simulated"].layer(self.llm.imagined_layer)
        asr = None if said is None else self.llm.transcription(read["spoken"], said, whole)
        positions = [len(state) for part in read.values() for state in part.states]
        tokens = torch.tensor(sum(len(part.states[0]) for part in read.values()), device=mask.device)
        passages = sum(positions) - tokens  # the states before the first layer come from none
        return Texts(real, simulated, tokens, passages, asr, answers)


def stored_texts(batch: Batch, like: Tensor, width: int) -> Texts:
    """The texts that lie in the shards, in the type of `like` [B, …]; no imagined text where there is none."""
    none = torch.tensor(0, device=batch["text_mask"].device)
    simulated = TextStates(like.new_zeros(len(like), 1, width), like.new_ones(len(like), 1, dtype=torch.bool))
    if "simulated" in batch:
        simulated = TextStates(batch["simulated"].to(like.dtype), batch["simulated_mask"])
    return Texts(TextStates(batch["text"].to(like.dtype), batch["text_mask"]), simulated, none, none, None, None)
