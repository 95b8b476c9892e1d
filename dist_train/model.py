"""The double flow: Figure 1 of the SDUMC paper (arXiv 2410.15029) on one page."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dist_train.audio import AudioEncoder, AudioFeatures
from dist_train.batch import Batch
from dist_train.fusion import FlowOutput, FusionNetwork, FusionWidths
from dist_train.llm import LanguageModel, Projector, TextFeatures, TextStates
from dist_train.recipe import Recipe


class Flows(NamedTuple):
    """What both flows say of a micro-batch, and how many language model positions [] it took."""

    complete: FlowOutput
    missing: FlowOutput
    tokens: Tensor


class DoubleFlow(nn.Module):
    """Complete flow (audio, real text, vision) and missing flow (audio, imagined text, vision) over the same clips.

    Every module runs once in the same order for every batch on every rank, also for clips that lack a modality:
    an absent modality is computed on a dummy
    and becomes one zero position, so gradients of different ranks always belong to the same parameters.

    Args:
        recipe: resolved recipe (feature widths filled in).
        tokenizer: of the language model.
    """

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        simulates = recipe.simulation.rollout != "none"
        minimum = recipe.simulation.stack_frames if simulates else 1  # frames: one position of imagined text
        self.rollout = recipe.simulation.rollout
        if recipe.audio.input == "waveform":
            self.audio: AudioEncoder | AudioFeatures = AudioEncoder(
                recipe.audio, minimum_frames=minimum, needs_last=simulates
            )
        else:
            self.audio = AudioFeatures(recipe.widths.audio, minimum_frames=minimum)
        self.llm = LanguageModel(recipe.text, recipe.simulation, tokenizer)
        self.text_features = (
            TextFeatures(recipe.widths.text, self.llm.width) if recipe.text.input == "features" else None
        )
        self.projector = Projector(self.audio.width, self.llm.width, recipe.simulation) if simulates else None
        self.fusion = FusionNetwork(
            FusionWidths(audio=self.audio.width, text=self.llm.width, vision=recipe.widths.vision),
            recipe.fusion,
            recipe.imagination,
        )

    def forward(self, batch: Batch) -> Flows:
        """Batch of B clips → both flows."""
        dtype = next(self.fusion.parameters()).dtype
        heard = self.audio(batch["audio"], batch["audio_mask"])
        audio = present_or_zero(heard.stream.to(dtype), heard.mask, batch["audio_present"])
        vision = present_or_zero(batch["vision"].to(dtype), batch["vision_mask"], batch["vision_present"])

        real = self.real_text(batch)
        simulated = self.simulated_text(heard.last.to(dtype), heard.mask, batch["audio_present"])
        tokens = real.mask.sum() + simulated.mask.sum()

        real = present_or_zero(*real, batch["text_present"])
        complete, missing = self.fusion(*audio, *real, *simulated, *vision)
        return Flows(complete, missing, tokens)

    def real_text(self, batch: Batch) -> TextStates:
        """States of the transcript [B, L, H]; only the complete flow sees them."""
        if self.text_features is not None:
            return self.text_features(batch["text"], batch["text_mask"])
        return self.llm.real(batch["text"], batch["text_mask"])

    def simulated_text(self, frames: Tensor, mask: Tensor, present: Tensor) -> TextStates:
        """States of the text imagined from the audio [B, N, H]; one zero position where it is not imagined."""
        if self.projector is None:
            nothing = frames.new_zeros(len(frames), 1, self.llm.width)
            return TextStates(nothing, torch.ones_like(nothing[..., 0], dtype=torch.bool))
        projected = self.projector(frames, mask)
        imagine = self.llm.generate if self.rollout == "generate" else self.llm.prefix
        return present_or_zero(*imagine(projected), present)


def present_or_zero(states: Tensor, mask: Tensor, present: Tensor) -> TextStates:
    """states [B, T, D], mask [B, T]; where present [B] is False: one zero position, still connected to the graph."""
    first = torch.zeros_like(mask)
    first[:, 0] = True
    return TextStates(states * present[:, None, None].to(states.dtype), torch.where(present[:, None], mask, first))
