"""The language model: one packed pass over the real text and the text it imagines from the audio (METHOD §1.1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dist_train.adapters import OUTPUT, Tuning, TuningSettings, apply_tuning
from dist_train.decoder import check_length, check_packs, check_plain, layers_of, logits_of, norm_of
from dist_train.packed import NAME, TextStates, Tokens, leave_before, pack, spread, take
from dist_train.pretrained import LOAD_ERRORS, cannot_load, config_problems, load_config, load_model, make_config
from dist_train.quantise import check_quantised, loading_config, quantise
from dist_train.rollout import SimulationSettings, answer, decode, sharded
from dist_train.tokenizer import start_id
from sharding.errors import UserError

LLAMA = "llama"  # `model_type` where text.config names none


class TextSettings(TuningSettings):
    """The language model and the states of the real transcript."""

    input: Literal["transcript", "features"] = Field(
        "transcript",
        description="`transcript`: the language model reads KEY.txt. "
        "`features`: KEY.text.npy enters as it is; where a language model imagines text, through a linear layer to "
        "that model's width.",
    )
    pretrained: str | None = Field(
        None,
        description="Local folder or hub id of a causal language model, e.g. lmsys/vicuna-7b-v1.5. Default: none; "
        "where all text comes as features there is no language model.",
    )
    config: dict[str, Any] | None = Field(
        None,
        description="Fields of the configuration of a randomly initialised model: `model_type` (of transformers; "
        "default llama) and those that it has. Default: none.",
    )
    tokenizer: str | None = Field(
        None,
        description="Local folder or hub id of a tokenizer, or a SentencePiece file of Llama's. Where it has no BOS, "
        "as Qwen's, transcripts begin with its EOS and the prompt with nothing. Default: that of `pretrained`; "
        "with `config`, one is trained on the training transcripts.",
    )
    vocabulary: int = Field(1024, ge=300, description="Number of tokens of a tokenizer trained on the transcripts.")
    layers: int = Field(4, ge=1, description="Real text = sum of the last `layers` hidden states.")
    max_tokens: int = Field(512, ge=8, description="Longest transcript accepted, in tokens.")
    activation_checkpointing: bool = Field(
        False,
        description="Keep only each layer's input for the backward pass and compute the layer again there: less "
        "memory, about a third more time.",
    )
    tuning: Tuning = Field("lora", description="`frozen`, `full`, or an adapter: `lora`, `dora`, `vera`.")


class Block(NamedTuple):
    """Rows of the packed pass: audio [B, A, H], then tokens [B, L]. States are read from column `first` on; unless
    `whole_way`, none above `simulation.layer`.
    """

    audio: TextStates | None
    tokens: Tokens | None
    first: int = 0
    whole_way: bool = True


class Pass(NamedTuple):
    """What the packed pass says of one block: the hidden states it went through (embeddings first, the last of a block
    that goes the whole way after the final norm) at its n real positions, each [n, H]; which positions of its rows
    [B, A + L] these are; from which column on to read.
    """

    states: Sequence[Tensor]
    mask: Tensor
    first: int

    def layer(self, index: int) -> TextStates:
        """One hidden state."""
        return self.padded(self.states[index])

    def last(self, count: int) -> TextStates:
        """The sum of the last `count` hidden states."""
        return self.padded(torch.stack(list(self.states[-count:])).sum(0))

    def padded(self, states: Tensor) -> TextStates:
        """States [n, H] → [B, columns from `first` on, H]."""
        return TextStates(spread(states, self.mask)[:, self.first :], self.mask[:, self.first :])


class LanguageModel(nn.Module):
    """A causal language model with its tokenizer's special ids.

    Real text: hidden states over the transcript. Imagined text: hidden states over [projected audio ; BOS +
    prompt ; answer], the answer decoded first. Both go through the decoder in one packed pass. Where the tokenizer has
    no BOS the prompt goes without.

    Args:
        transcribes: an ASR loss reads `transcription`.
        dtype: of loaded weights.
    """

    def __init__(
        self,
        settings: TextSettings,
        simulation: SimulationSettings,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype = torch.float32,
        *,
        transcribes: bool = False,
    ) -> None:
        super().__init__()
        self.causal: Any = build_causal_lm(settings, tokenizer, dtype)
        self.causal.set_attn_implementation(NAME)
        self.causal.generation_config = GenerationConfig()  # a model may bring its own: sampling, penalties
        self.width: int = self.causal.config.hidden_size
        self.simulation = simulation
        self.eos, self.pad = tokenizer.eos_token_id, pad_id(tokenizer)
        prompt = tokenizer(simulation.prompt, add_special_tokens=False).input_ids
        if tokenizer.bos_token_id is not None or not prompt:
            prompt = [start_id(tokenizer), *prompt]
        self.prompt: Tensor
        self.register_buffer("prompt", torch.tensor(prompt), persistent=False)
        self.check_layers(settings)
        apply_tuning(self.causal, settings, where="text")
        self.freeze_unreached(settings, transcribes=transcribes)
        leave_before(layers_of(self.causal)[max(self.imagined_layer, 1) :])
        self.trained = settings.tuning != "frozen"
        self.checkpoints = settings.activation_checkpointing
        if self.checkpoints:
            # Reentrant checkpointing fails under ZeRO-2 and -3.
            old_name = "gradient_checkpointing_enable"
            getattr(self.causal, "activation_checkpointing_enable", getattr(self.causal, old_name))(
                {"use_reentrant": False}
            )

    def check_layers(self, settings: TextSettings) -> None:
        """Refuses hidden states that the model does not have.

        Raises:
            UserError: it does not.
        """
        count, layer = self.causal.config.num_hidden_layers, self.simulation.layer
        if settings.input == "transcript" and settings.layers > count + 1:
            raise UserError(
                "text.layers",
                f"{settings.layers} hidden states are asked of a model with {count} layers",
                f"Write at most {count + 1}.",
            )
        if self.simulation.imagines and not -count - 1 <= layer <= count:
            raise UserError(
                "simulation.layer",
                f"{layer} is outside hidden_states of a model with {count} layers",
                f"Write a number from {-count - 1} to {count}.",
            )

    @property
    def imagined_layer(self) -> int:
        """Decoder layers below the imagined text's states."""
        count = self.causal.config.num_hidden_layers
        return self.simulation.layer % (count + 1) if self.simulation.imagines else 0

    def freeze_unreached(self, settings: TextSettings, *, transcribes: bool) -> None:
        """No gradient for what no loss reaches: ZeRO-3 would apply old gradients to it."""
        layers, norm = layers_of(self.causal), norm_of(self.causal)
        embeddings = self.causal.get_input_embeddings()
        output = self.causal.get_output_embeddings()
        if transcribes:
            return  # transcripts are read and spoken: everything is reached
        if output.weight is not embeddings.weight:
            output.requires_grad_(False)  # serves decoding only
        if settings.input == "transcript":
            return
        reached = self.imagined_layer
        layers[reached:].requires_grad_(False)
        if reached < len(layers):
            norm.requires_grad_(False)
        if not self.simulation.decodes:
            embeddings.requires_grad_(False)

    def train(self, mode: bool = True) -> LanguageModel:
        """Sets training mode; a frozen model stays in evaluation mode."""
        super().train(mode and self.trained)
        if self.checkpoints:  # transformers asks the layers' own flag; what is inside them keeps its mode
            for layer in layers_of(self.causal):
                layer.training = mode
        return self

    def question(self, audio: TextStates, said: Tokens | None, whole: Tensor) -> Block:
        """[projected audio ; BOS + prompt ; said without its last token], to read the states that emit what is said;
        without `said`, [projected audio] alone.

        The states equal those of decode time because the model is causal (METHOD §1.1). Nor can the prompt reach the
        audio's states, so there it is left out.

        Args:
            audio: projected audio.
            said: tokens, at least one per row.
            whole: bool [B]; of another row only the first audio position and the last of the prompt are kept, so that
                projector and embeddings stay in the graph at little cost. `said` is one token there.
        """
        if said is None:
            return Block(audio, None)
        rows, prompt = len(whole), len(self.prompt)
        asked = torch.ones(rows, prompt, dtype=torch.bool, device=whole.device)
        asked[:, :-1] = whole[:, None]
        heard = audio.mask & whole[:, None]
        heard[:, 0] |= ~whole
        return Block(
            TextStates(audio.states, heard),
            Tokens(
                torch.cat([self.prompt.expand(rows, -1), said.ids[:, :-1]], 1),
                torch.cat([asked, said.mask[:, 1:]], 1),
            ),
            audio.mask.shape[1] + prompt - 1,
        )

    def read(self, blocks: Sequence[Block]) -> list[Pass]:
        """All blocks in one pass of the decoder, without padding; those that go the whole way come first."""
        tokens = [block.tokens for block in blocks if block.tokens is not None]
        if tokens:  # one look-up: under ZeRO-3 each gathers the table
            ids = torch.cat([part.ids.flatten() for part in tokens])
            found = self.causal.get_input_embeddings()(ids).split([part.ids.numel() for part in tokens])
            embedded = iter([x.unflatten(0, part.ids.shape) for x, part in zip(found, tokens, strict=True)])
        inputs = []
        for block in blocks:
            parts = [] if block.audio is None else [block.audio]
            if block.tokens is not None:
                parts.append(TextStates(next(embedded), block.tokens.mask))
            inputs.append(TextStates(*(torch.cat(columns, 1) for columns in zip(*parts, strict=True))))
        rows = [len(x.mask) for x in inputs]
        staying = sum(count for count, block in zip(rows, blocks, strict=True) if block.whole_way)
        packed, segments = pack(inputs, staying or None)  # the upper layers cannot run on nothing
        check_length(self.causal.config, segments.longest)
        states = self.causal.get_decoder()(
            inputs_embeds=packed,
            position_ids=segments.positions,
            attention_mask=packed.new_empty(0, 0, 0, 0),  # four dimensions: taken as it is, no N × N mask is built
            segments=segments,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        lengths = iter(segments.lengths)
        sizes = [sum(next(lengths) for _ in range(count)) for count in rows]
        found = []
        for x, block, end, size in zip(inputs, blocks, np.cumsum(sizes), sizes, strict=True):
            there = [state[0, end - size : end] for state in states if state.shape[1] >= end]
            found.append(Pass(there, x.mask, block.first))
        return found

    def answers(self, audio: TextStates, wanted: Tensor, known: Tokens | None) -> Tokens:
        """What the model says to the audio of each clip, under no_grad: at least one token per row.

        Args:
            audio: projected audio.
            wanted: bool [B], clips whose answer matters; the others get one token.
            known: answers at hand, no token where there is none; clips that have one are not decoded.
        """
        with torch.no_grad():
            prompt = self.causal.get_input_embeddings()(self.prompt)

        def ask(rows: Tensor) -> Tokens:
            states, mask = audio.states[rows].detach(), audio.mask[rows]
            prefix = TextStates(
                torch.cat([states, prompt.expand(len(rows), -1, -1)], 1),
                torch.cat([mask, mask.new_ones(len(rows), len(prompt))], 1),
            )
            return decode(
                self.causal,
                prefix,
                beams=self.simulation.beams,
                limit=self.simulation.max_new_tokens,
                eos=self.eos,
                pad=self.pad,
            )

        return answer(wanted, known, ask, everywhere=sharded(self.causal), filler=self.eos)

    def transcript(self, text: Tokens, whole: Tensor) -> Tokens:
        """The transcript that follows BOS in `text`, EOS behind it: what ASR has to say; one token where `whole` [B]
        is False.
        """
        ids = torch.cat([text.ids[:, 1:], text.ids[:, :1]], 1)
        ids = ids.scatter(1, text.mask.sum(1, keepdim=True) - 1, self.eos)
        mask = text.mask & whole[:, None]
        mask[:, 0] = True
        return Tokens(ids, mask)

    def transcription(self, spoken: Pass, said: Tokens, whole: Tensor) -> Tensor:
        """[B, 2] fp32: negative log-likelihood of the transcript in nats, and its number of tokens; 0 and 0 where
        `whole` [B] is False (SLAM-ASR, arXiv 2402.08846).
        """
        logits = logits_of(self.causal, take(*spoken.layer(-1)))  # nowhere else
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        surprise = nn.functional.cross_entropy(exact, take(*said), reduction="none")
        return torch.stack([spread(surprise, said.mask).sum(1), said.mask.sum(1).to(exact.dtype)], 1) * whole[:, None]


class TextFeatures(nn.Module):
    """Text features [B, L, D] that are already in the shards → the language model's width."""

    def __init__(self, width: int, text_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, text_width)

    def forward(self, features: Tensor, mask: Tensor) -> TextStates:
        """features [B, L, D], mask [B, L] → [B, L, H]."""
        return TextStates(self.linear(features.to(self.linear.weight.dtype)), mask)


def build_causal_lm(
    settings: TextSettings, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The causal language model from a folder, the hub or a configuration.

    Args:
        dtype: of its weights if they are loaded, and of the arithmetic of quantised layers.

    Raises:
        UserError: for a model that cannot be loaded, or whose packed pass would not be right.
    """
    if settings.pretrained is None:
        special = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": pad_id(tokenizer),
        }
        config = make_config({**special, **(settings.config or {})}, LLAMA)
        check_packs(config, "text.config")
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        quantise(model, settings.quantisation, settings.int8_threshold, dtype, skip=OUTPUT)
    else:
        check_packs(load_config("text.pretrained", settings.pretrained), "text.pretrained")
        model = load_model(
            AutoModelForCausalLM,
            "text.pretrained",
            settings.pretrained,
            dtype=dtype,
            quantization_config=loading_config(settings.quantisation, settings.int8_threshold, dtype),
        )
    check_quantised(model, settings.quantisation, where="text")
    known = model.config.vocab_size
    if len(tokenizer) > known:
        raise UserError(
            "text.tokenizer",
            f"has {len(tokenizer)} tokens, the language model knows {known}",
            "Use the tokenizer that belongs to text.pretrained, and leave vocab_size out of text.config.",
        )
    return model


def text_problems(config: dict[str, Any]) -> Iterator[UserError]:
    """What is wrong with the fields of `text.config`."""

    def build(made: PretrainedConfig) -> nn.Module:
        check_plain(made, "text.config")
        model: nn.Module = AutoModelForCausalLM.from_config(made)
        return model

    words = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}
    kinds = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    yield from config_problems(config, "text.config", kinds, LLAMA, build, lambda _: words)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Llama tokenizers have no padding token: padded positions are masked, so the end token serves."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def load_tokenizer(name: str, where: str = "text.tokenizer") -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, a hub id, or a SentencePiece `.model` file of Llama.

    Raises:
        UserError: if it cannot be loaded or has no EOS token.
    """
    kind: Any = LlamaTokenizer if Path(name).is_file() else AutoTokenizer
    try:
        tokenizer = kind.from_pretrained(name, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise cannot_load(where, name, error) from None
    if tokenizer.eos_token_id is None:
        raise UserError(where, f"{name!r} has no EOS token", "Use the tokenizer of a causal language model.")
    return tokenizer
