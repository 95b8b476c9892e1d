"""What is known of pretrained models without their weights: configurations, and a tokenizer's sizes."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dist_train.decoder import check_packs
from dist_train.llm import LLAMA, load_tokenizer
from dist_train.pretrained import LOAD_ERRORS, layer_problems, make_config
from dist_train.recipe import Recipe
from dist_train.speech_encoders import KINDS
from sharding.errors import UserError

CHARACTERS_PER_TOKEN = 4  # of a prompt, in English
BOS, EOS = 1, 2  # Llama's
# Of the files of a model, not of its shapes.
OF_THE_FILES = {"architectures", "transformers_version", "torch_dtype", "dtype", "quantization_config", "_name_or_path"}

# The fields of their config.json on the hub that decide shapes.
KNOWN: dict[str, dict[str, Any]] = {
    "lmsys/vicuna-7b-v1.5": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-5,
    },
    "Qwen/Qwen2.5-7B": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "vocab_size": 152064,
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
    "facebook/hubert-large-ll60k": {
        "model_type": "hubert",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "conv_dim": [512] * 7,
        "conv_bias": True,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "num_conv_pos_embeddings": 128,
        "num_conv_pos_embedding_groups": 16,
    },
    "microsoft/wavlm-large": {
        "model_type": "wavlm",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "conv_dim": [512] * 7,
        "conv_bias": False,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "num_buckets": 320,
        "max_bucket_distance": 800,
        "num_conv_pos_embeddings": 128,
        "num_conv_pos_embedding_groups": 16,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.0,
        "feat_proj_dropout": 0.1,
    },
}


# What their files on the hub hold.
STORED = {
    "lmsys/vicuna-7b-v1.5": torch.float16,
    "Qwen/Qwen2.5-7B": torch.bfloat16,
    "microsoft/wavlm-large": torch.float32,
    "facebook/hubert-large-ll60k": torch.float32,
}


def stored_type(name: str) -> torch.dtype | None:
    """Type of the weights in a pretrained model's files, if that is known."""
    if not Path(name).is_dir() and name in STORED:
        return STORED[name]
    try:
        found = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False).dtype
    except LOAD_ERRORS:
        return None
    return found if isinstance(found, torch.dtype) else None


def without_weights(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with `pretrained` parts given by their configuration, and notes on what was taken from where.

    Raises:
        UserError: a configuration cannot be had, or is of no model that can be planned.
    """
    changed, notes = recipe.model_copy(deep=True), []
    changed.simulation.projector = None  # weights that have no shape of their own
    parts: list[tuple[str, Any, Collection[str]]] = (
        [("text", changed.text, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)] if recipe.reads_language_model else []
    )
    if recipe.audio.input == "waveform":
        parts.append(("audio", changed.audio, KINDS))
    for name, part, kinds in parts:
        if part.pretrained is None:
            continue
        fields, note = configuration(part.pretrained, f"{name}.pretrained")
        if fields.get("model_type") not in kinds:
            known = ", ".join(kinds) if name == "audio" else "causal language models"
            raise UserError(
                f"{name}.pretrained",
                f"{part.pretrained} is a {fields.get('model_type')} model; what can be planned: {known}",
                f"Describe one of its size in {name}.config.",
            )
        stored = stored_type(part.pretrained)
        if stored not in (None, recipe.dtype):
            notes.append(
                f"{part.pretrained} is stored in {str(stored).removeprefix('torch.')}: each rank makes a copy in "
                f"{recipe.precision} while it loads. Files in {recipe.precision} would be mapped, once per node."
            )
        if name == "text":
            check_packs(make_config(fields, LLAMA), "text.pretrained")
        part.config, part.pretrained = fields, None
        notes += note
    return changed, notes


def configuration(name: str, where: str) -> tuple[dict[str, Any], list[str]]:
    """Fields of a model's configuration: from a folder, the cache or the hub, else from the table above.

    Raises:
        UserError: from none of them.
    """
    if not Path(name).is_dir() and name in KNOWN:
        found = read_configuration(name, local=True)
        if found is None:
            return KNOWN[name], [f"{name} is not on this machine: its shapes are those known of it."]
        return found, []
    found = read_configuration(name, local=False)
    if found is None:
        raise UserError(
            where, f"has no configuration for {name!r} here or on the hub", "Give a local folder with its config.json."
        )
    for problem in layer_problems(found, where):
        raise problem
    return found, []


def read_configuration(name: str, *, local: bool) -> dict[str, Any] | None:
    """What config.json says, or None."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except LOAD_ERRORS:
        return None
    fields = config.to_dict()
    return {key: value for key, value in fields.items() if key not in OF_THE_FILES}


class Sizes:
    """Stands in for a tokenizer: how many tokens it knows and makes.

    Args:
        tokens: of its vocabulary.
    """

    bos_token_id, eos_token_id, pad_token_id = BOS, EOS, None

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.input_ids: list[int] = []

    def __len__(self) -> int:
        return self.tokens

    def __call__(self, text: str, **_: Any) -> Sizes:
        """As many tokens as English text of this length usually has."""
        made = Sizes(self.tokens)
        made.input_ids = [EOS] * math.ceil(len(text) / CHARACTERS_PER_TOKEN)
        return made


def tokenizer_of(recipe: Recipe) -> Any:
    """The recipe's tokenizer if it lies in a folder, else one that stands in for it; None where none is needed."""
    if not recipe.reads_language_model:
        return None
    name = recipe.text.tokenizer or recipe.text.pretrained
    if name is not None and Path(name).exists():
        return load_tokenizer(name)
    if recipe.text.pretrained is not None:
        return Sizes(configuration(recipe.text.pretrained, "text.pretrained")[0]["vocab_size"])
    return Sizes(recipe.text.vocabulary)
