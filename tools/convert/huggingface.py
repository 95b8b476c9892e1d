"""Hugging Face folders: a causal language model with its tokenizer, and WavLM with its feature extractor."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WavLMModel,
)

from dist_train.audio import SAMPLE_RATE
from dist_train.llm import load_tokenizer
from dist_train.pretrained import LOAD_ERRORS
from sharding.errors import UserError
from tools.convert.base import open_folder
from tools.convert.held import Held, Tensors
from tools.convert.safetensors_shards import write_shards
from tools.convert.source import PREFIX, Context, Outgoing, Part, Source, others, select
from tools.convert.whole import Whole, whole_model


def detect(path: Path, part: Part) -> bool:
    """Whether a folder holds a model of that kind (config.json and weights)."""
    if not (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return False
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except LOAD_ERRORS:
        return False
    return isinstance(config, WavLMConfig) == (part == "audio")


def detect_causal(path: Path) -> bool:
    """Whether a folder holds a language model."""
    return detect(path, "llm")


def detect_wavlm(path: Path) -> bool:
    """Whether a folder holds a WavLM."""
    return detect(path, "audio")


def read(path: Path, part: Part) -> Source:
    """A folder's model by our names."""
    base = open_folder(path, part, str(path))
    prefix = PREFIX[part]
    held = Held(select(base.tensors, {f"{prefix}{name}": name for name in base.tensors.shapes}))
    tokenizer = None
    if part == "llm" and any(path.glob("tokenizer*")):
        tokenizer = load_tokenizer(str(path), str(path))
    return Source(held, [path / "config.json", *base.files], models={part: base.config}, tokenizer=tokenizer)


def read_causal(path: Path, context: Context) -> Source:
    """A language model's folder."""
    return read(path, "llm")


def read_wavlm(path: Path, context: Context) -> Source:
    """A WavLM's folder."""
    return read(path, "audio")


def plan_causal(source: Source, context: Context) -> Outgoing:
    """The merged language model, in bf16 unless the source is whole (then as it is) or `--dtype` is given.

    Raises:
        UserError: no tokenizer is at hand, or see `whole_model`.
    """
    dtype = context.dtype or (None if "llm" in source.models else torch.bfloat16)
    model = whole_model(source, context, "llm", dtype)
    tokenizer = find_tokenizer(source, context, model)
    config = with_dtype(model.config, model.tensors)
    generation = model.base.folder / "generation_config.json" if model.base and model.base.folder else None

    def save(place: Path, tensors: Tensors) -> None:
        write_shards(place, tensors)
        config.save_pretrained(place)
        save_tokenizer(tokenizer, place)
        if generation is not None and generation.is_file():
            GenerationConfig.from_pretrained(generation.parent).save_pretrained(place)

    def reopen(place: Path) -> Iterable[tuple[str, Tensor]]:
        again: Any = AutoTokenizer.from_pretrained(place)
        text = "Say it again: 1, 2."
        if again(text).input_ids != tokenizer(text).input_ids:
            raise UserError(
                str(place),
                f"is opened with a {type(again).__name__}, which reads other tokens than the run's tokenizer",
                f"transformers opens every {config.model_type} folder so: give the run that model's own tokenizer.",
            )
        return reopened(AutoModelForCausalLM, place, model.tensors, config)

    return Outgoing(
        model.tensors,
        save,
        reopen,
        "transformers.AutoModelForCausalLM",
        files=["config.json", "tokenizer.json", "tokenizer_config.json"],
        left_out=others(source, model.taken),
        notes=model.notes,
        base=model.base.folder if model.base is not None else None,
    )


def plan_wavlm(source: Source, context: Context) -> Outgoing:
    """The whole WavLM, in fp32 unless `--dtype` is given."""
    model = whole_model(source, context, "audio", context.dtype or torch.float32)
    config = with_dtype(model.config, model.tensors)
    if context.run is not None:  # a run's WavLM is built without them; the folder is a WavLM like its base
        config.architectures = ["WavLMModel"]
    layered = getattr(config, "feat_extract_norm", "layer") == "layer"
    extractor = Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=SAMPLE_RATE, do_normalize=layered, return_attention_mask=layered
    )

    def save(place: Path, tensors: Tensors) -> None:
        write_shards(place, tensors)
        config.save_pretrained(place)
        extractor.save_pretrained(place)

    return Outgoing(
        model.tensors,
        save,
        lambda place: reopened(WavLMModel, place, model.tensors, config),
        "transformers.WavLMModel",
        files=["config.json", "preprocessor_config.json"],
        left_out=others(source, model.taken),
        notes=model.notes,
        base=model.base.folder if model.base is not None else None,
    )


def find_tokenizer(source: Source, context: Context, model: Whole) -> PreTrainedTokenizerBase:
    """The source's tokenizer, the run's, or the base's.

    Raises:
        UserError: there is none.
    """
    if source.tokenizer is not None:
        return source.tokenizer
    if context.run is not None:
        return context.run.tokenizer()
    if model.base is not None and model.base.folder is not None:
        return load_tokenizer(str(model.base.folder), "--base")
    raise UserError("SRC", "has no tokenizer", "Give the --run it belongs to, or put its tokenizer beside it.")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, place: Path) -> None:
    """Its files.

    Raises:
        OSError: the disk refuses them.
    """
    try:
        tokenizer.save_pretrained(place)
    except Exception as error:  # the tokenizers package raises nothing more special
        raise OSError(None, str(error), str(place)) from None


def with_dtype(config: PretrainedConfig, tensors: Tensors) -> PretrainedConfig:
    """A copy of the configuration that says the weights' precision."""
    config = copy.deepcopy(config)
    config.dtype = next(kind for kind in tensors.dtypes.values() if kind.is_floating_point)
    return config


def reopened(kind: Any, place: Path, written: Tensors, config: PretrainedConfig) -> Iterable[tuple[str, Tensor]]:
    """The model that transformers makes of a folder, by the names that were written.

    Raises:
        UserError: it finds weights missing, or some too many.
    """
    model, info = kind.from_pretrained(place, output_loading_info=True, dtype=config.dtype)
    odd = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if odd:
        raise UserError(str(place), f"is not read whole by transformers ({odd[0]})", "Report this.")
    state = model.state_dict()
    return ((name, state[name]) for name in written.shapes)
