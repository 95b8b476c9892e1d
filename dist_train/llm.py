"""The language model: states of the real text, and states of the text it imagines from the audio (METHOD §1.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dist_train.adapters import LoraSettings, Tuning, apply_tuning
from dist_train.pretrained import LOAD_ERRORS, cannot_load, load_model
from sharding.errors import UserError

PAPER_PROMPT = (
    "USER: Transcribe speech to text. Output the transcription directly without redundant content. "
    "Ensure that the output is not duplicated. \n ASSISTANT:"
)


class TextSettings(BaseModel):
    """The language model and the states of the real transcript."""

    model_config = ConfigDict(extra="forbid")

    input: Literal["transcript", "features"] = Field(
        "transcript",
        description="`transcript`: the language model reads KEY.txt. "
        "`features`: KEY.text.npy enters through a linear layer.",
    )
    pretrained: str | None = Field(
        None, description="Local folder or hub id of a causal language model, e.g. lmsys/vicuna-7b-v1.5. Default: none."
    )
    config: dict[str, Any] | None = Field(
        None, description="Fields of transformers.LlamaConfig for a randomly initialised model. Default: none."
    )
    tokenizer: str | None = Field(
        None,
        description="Local folder, hub id or SentencePiece file of a Llama tokenizer. Default: that of `pretrained`; "
        "with `config`, one is trained on the training transcripts.",
    )
    vocabulary: int = Field(1024, ge=300, description="Number of tokens of a tokenizer trained on the transcripts.")
    layers: int = Field(4, ge=1, description="Real text = sum of the last `layers` hidden states.")
    max_tokens: int = Field(512, ge=8, description="Longest transcript accepted, in tokens.")
    tuning: Tuning = Field("lora", description="`frozen`, `full` or `lora`.")
    lora: LoraSettings = Field(default_factory=LoraSettings, description="LoRA on the language model.")


class SimulationSettings(BaseModel):
    """How the language model imagines the text of a clip whose transcript is missing."""

    model_config = ConfigDict(extra="forbid")

    rollout: Literal["generate", "prefix", "none"] = Field(
        "generate",
        description="`generate`: greedy decoding, then one differentiable pass, states of the answer. "
        "`prefix`: no decoding, states at the audio positions. `none`: no imagined text.",
    )
    layer: int = Field(-4, description="Index into the language model's hidden_states for the imagined text.")
    max_new_tokens: int = Field(200, ge=1, description="Longest answer, in tokens.")
    prompt: str = Field(PAPER_PROMPT, description="Prompt after the audio.")
    stack_frames: int = Field(5, ge=1, description="Audio frames stacked into one language model position.")
    projector_width: int = Field(2048, ge=1, description="Hidden width of the projector.")


class TextStates(NamedTuple):
    """states [B, L, H] and mask [B, L] (True = real)."""

    states: Tensor
    mask: Tensor


class Projector(nn.Module):
    """SLAM-ASR's linear projector (arXiv 2402.08846): stack k frames, Linear, ReLU, Linear. Drops T mod k frames."""

    def __init__(self, audio_width: int, text_width: int, settings: SimulationSettings) -> None:
        super().__init__()
        self.stack = settings.stack_frames
        self.linear1 = nn.Linear(audio_width * self.stack, settings.projector_width)
        self.linear2 = nn.Linear(settings.projector_width, text_width)

    def forward(self, frames: Tensor, mask: Tensor) -> TextStates:
        """frames [B, T, D], mask [B, T] → [B, T//k, H] and its mask; a position counts if all its k frames do."""
        B, T, D = frames.shape
        length = T // self.stack
        stacked = frames[:, : length * self.stack].reshape(B, length, D * self.stack)
        lengths = mask.sum(1) // self.stack
        kept = torch.arange(length, device=mask.device) < lengths[:, None]
        return TextStates(self.linear2(torch.relu(self.linear1(stacked))), kept)


class LanguageModel(nn.Module):
    """A causal language model with its tokenizer's special ids.

    Real text: hidden states over the transcript. Imagined text: hidden states over [projected audio ; BOS +
    prompt ; answer], the answer decoded greedily.
    """

    def __init__(
        self, settings: TextSettings, simulation: SimulationSettings, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().__init__()
        self.causal: Any = build_causal_lm(settings, tokenizer)
        self.causal.generation_config = GenerationConfig()  # a model may bring its own: sampling, penalties
        self.width: int = self.causal.config.hidden_size
        self.layers = settings.layers
        self.layer = simulation.layer
        self.max_new_tokens = simulation.max_new_tokens
        self.eos, self.pad = tokenizer.eos_token_id, pad_id(tokenizer)
        prompt = [tokenizer.bos_token_id, *tokenizer(simulation.prompt, add_special_tokens=False).input_ids]
        self.prompt: Tensor
        self.register_buffer("prompt", torch.tensor(prompt), persistent=False)
        count = self.causal.config.num_hidden_layers
        if settings.input == "transcript" and settings.layers > count + 1:
            raise UserError(
                "text.layers",
                f"{settings.layers} hidden states are asked of a model with {count} layers",
                f"Write at most {count + 1}.",
            )
        if simulation.rollout != "none" and not -count - 1 <= simulation.layer <= count:
            raise UserError(
                "simulation.layer",
                f"{simulation.layer} is outside hidden_states of a model with {count} layers",
                f"Write a number from {-count - 1} to {count}.",
            )
        apply_tuning(self.causal, settings.tuning, settings.lora, where="text")
        self.freeze_unreached(settings, simulation)
        self.trained = settings.tuning != "frozen"

    def freeze_unreached(self, settings: TextSettings, simulation: SimulationSettings) -> None:
        """No gradient for what no loss reaches: ZeRO-3 would apply old gradients to it."""
        decoder, embeddings = self.causal.get_decoder(), self.causal.get_input_embeddings()
        output = self.causal.get_output_embeddings()
        if output.weight is not embeddings.weight:
            output.requires_grad_(False)  # serves decoding only
        if settings.input == "transcript":
            return
        count = len(decoder.layers)
        reached = simulation.layer % (count + 1) if simulation.rollout != "none" else 0
        decoder.layers[reached:].requires_grad_(False)
        decoder.norm.requires_grad_(decoder.norm.weight.requires_grad and reached == count)
        if simulation.rollout != "generate":
            embeddings.requires_grad_(False)

    def train(self, mode: bool = True) -> LanguageModel:
        """Sets training mode; a frozen model stays in evaluation mode."""
        super().train(mode and self.trained)
        return self

    def hidden_states(self, **inputs: Any) -> tuple[Tensor, ...]:
        """All hidden states of the decoder (embeddings first, the last after the final norm)."""
        return self.causal.get_decoder()(**inputs, output_hidden_states=True, use_cache=False).hidden_states

    def real(self, tokens: Tensor, mask: Tensor) -> TextStates:
        """tokens [B, L] (BOS kept), mask [B, L] → sum of the last hidden states [B, L, H]."""
        states = self.hidden_states(input_ids=tokens, attention_mask=mask.long())
        return TextStates(torch.stack(states[-self.layers :]).sum(0), mask)

    def prefix(self, audio: TextStates) -> TextStates:
        """States at the audio positions. The prompt comes after them and the model is causal, so it is left out."""
        states = self.hidden_states(inputs_embeds=audio.states, attention_mask=audio.mask.long())
        return TextStates(states[self.layer], audio.mask)

    def generate(self, audio: TextStates) -> TextStates:
        """Greedy answer under no_grad, then one differentiable pass; the state that emitted each answer token.

        The states equal those of decode time because the model is causal (METHOD §1.1).
        """
        answer = self.decode(audio)
        embed = self.causal.get_input_embeddings()
        # Each row is [audio ; prompt ; answer without its last token], shifted together so that padding is
        # on the right.
        lengths, prompt = audio.mask.sum(1), len(self.prompt)
        ended = (answer == self.eos).cumsum(1) - (answer == self.eos).long()
        answer_mask = ended == 0
        asked = torch.cat([self.prompt.expand(len(answer), -1), answer[:, :-1]], 1)
        joined = torch.cat([audio.states, embed(asked)], 1)
        joined_mask = torch.cat(
            [audio.mask, torch.ones_like(asked[:, :prompt], dtype=torch.bool), answer_mask[:, 1:]], 1
        )
        order = torch.argsort((~joined_mask).to(torch.int8), dim=1, stable=True)
        width = int(joined_mask.sum(1).max())
        order = order[:, :width]
        joined = torch.gather(joined, 1, order[..., None].expand(-1, -1, joined.shape[2]))
        states = self.hidden_states(inputs_embeds=joined, attention_mask=torch.gather(joined_mask, 1, order).long())[
            self.layer
        ]
        # The first answer token is emitted at the last prompt position.
        positions = lengths[:, None] + prompt - 1 + torch.arange(answer.shape[1], device=answer.device)
        positions = positions.clamp(max=width - 1)
        picked = torch.gather(states, 1, positions[..., None].expand(-1, -1, states.shape[2]))
        return TextStates(picked, answer_mask)

    @torch.no_grad()
    def decode(self, audio: TextStates) -> Tensor:
        """Greedy answer tokens [B, N], EOS included, padded behind it. All ranks run the same number of passes under
        ZeRO-3.
        """
        embeds = torch.cat(
            [audio.states, self.causal.get_input_embeddings()(self.prompt).expand(len(audio.mask), -1, -1)], 1
        )
        mask = torch.cat([audio.mask, audio.mask.new_ones(len(audio.mask), len(self.prompt))], 1)
        # Decoding wants padding on the left.
        order = torch.argsort(mask.to(torch.int8), dim=1, stable=True)
        embeds = torch.gather(embeds, 1, order[..., None].expand_as(embeds))
        was_training = self.causal.training
        self.causal.eval()
        answer = self.causal.generate(
            inputs_embeds=embeds,
            attention_mask=torch.gather(mask, 1, order).long(),
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.eos,
            pad_token_id=self.pad,
            synced_gpus=hasattr(self.causal.get_input_embeddings().weight, "ds_id"),
        )
        self.causal.train(was_training)
        return answer


class TextFeatures(nn.Module):
    """Text features [B, L, D] that are already in the shards → the language model's width."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, text_width)

    def forward(self, features: Tensor, mask: Tensor) -> TextStates:
        """features [B, L, D], mask [B, L] → [B, L, H]."""
        return TextStates(self.linear(features.to(self.linear.weight.dtype)), mask)


def build_causal_lm(settings: TextSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The causal language model from a folder, the hub or a configuration.

    Raises:
        UserError: for a model that cannot be loaded.
    """
    if settings.pretrained is None:
        special = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": pad_id(tokenizer),
        }
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**{**special, **(settings.config or {})}))
    else:
        model = load_model(AutoModelForCausalLM, "text.pretrained", settings.pretrained)
    known = model.config.vocab_size
    if len(tokenizer) > known:
        raise UserError(
            "text.tokenizer",
            f"has {len(tokenizer)} tokens, the language model knows {known}",
            "Use the tokenizer that belongs to text.pretrained, and leave vocab_size out of text.config.",
        )
    return model


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Llama tokenizers have no padding token: padded positions are masked, so the end token serves."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, a hub id, or a SentencePiece `.model` file of Llama.

    Raises:
        UserError: if it cannot be loaded or has no BOS and EOS tokens.
    """
    kind: Any = LlamaTokenizer if Path(name).is_file() else AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(name)
    except LOAD_ERRORS as error:
        raise cannot_load("text.tokenizer", name, error) from None
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError("text.tokenizer", f"{name!r} has no BOS or EOS token", "Use a Llama-type tokenizer.")
    return tokenizer
