"""A tiny language model with far from small weights, ragged audio for it, and the stock model to compare it with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from dist_train.llm import LanguageModel, TextSettings
from dist_train.packed import TextStates, Tokens
from dist_train.rollout import SimulationSettings
from tests import tiny

LAYERS, WIDTH = 3, 16


def text_settings(**changes: Any) -> TextSettings:
    return TextSettings(**{**tiny.recipe(Path("none")).text.model_dump(), **changes})


def build(
    tokenizer: PreTrainedTokenizerBase,
    simulation: dict[str, Any] | None = None,
    *,
    transcribes: bool = False,
    **text: Any,
) -> LanguageModel:
    """Weights large enough that answers vary, float64 so that none is decided by rounding."""
    settings = SimulationSettings(**{"layer": -2, "prompt": "Say:", "max_new_tokens": 6, **(simulation or {})})
    model = LanguageModel(text_settings(**text), settings, tokenizer, transcribes=transcribes).eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5)
    return model


def stock(model: LanguageModel) -> Any:
    """The same weights in transformers' own model, with its own attention."""
    found = LlamaForCausalLM(copy.deepcopy(model.causal.config)).eval().double()
    found.load_state_dict(model.causal.state_dict())
    found.set_attn_implementation("sdpa")
    return found


def ragged_audio(*lengths: int) -> TextStates:
    """Projected audio of the given lengths; what stands in the padding must not matter."""
    rows = [torch.randn(length, WIDTH, dtype=torch.float64) for length in lengths]
    padded = pad_sequence(rows, batch_first=True, padding_value=9.0)
    return TextStates(padded, torch.arange(padded.shape[1]) < torch.tensor(lengths)[:, None])


def all_of(audio: TextStates) -> Tensor:
    return torch.ones(len(audio.mask), dtype=torch.bool)


def imagine(model: LanguageModel, audio: TextStates) -> tuple[TextStates, Tokens | None]:
    """States of the imagined text, and the answers they belong to."""
    whole = all_of(audio)
    answers = model.answers(audio, whole, None) if model.simulation.decodes else None
    return model.read([model.question(audio, answers, whole)])[0].layer(model.imagined_layer), answers
