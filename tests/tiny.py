"""A tiny model and corpus that exercise everything in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dist_train.recipe import Recipe, validate
from sharding.shard_writer import pack_sample, write_dataset
from sharding.shards import Dims, Split

WORDS = [
    "good",
    "bad",
    "awful",
    "great",
    "film",
    "plot",
    "actor",
    "boring",
    "lovely",
    "the",
    "a",
    "was",
    "is",
    "really",
]
VISION_WIDTH = 5


def clip(rng: np.random.Generator, *, audio: bool = True, text: bool = True, vision: bool = True) -> dict[str, Any]:
    """Arguments of pack_sample but key and split: half a second or so of noise, a few words, a few face frames."""
    samples = rng.integers(3000, 9000)
    return {
        "label": round(float(rng.uniform(-3, 3)) * 3) / 3,
        "audio": rng.uniform(-0.5, 0.5, samples).astype(np.float32) if audio else None,
        "text": " ".join(rng.choice(WORDS, rng.integers(1, 9))) if text else None,
        "text_features": None,
        "simulated": None,
        "vision": rng.normal(size=(rng.integers(1, 9), VISION_WIDTH)).astype(np.float32) if vision else None,
    }


def write_corpus(out: Path, *, train: int = 22, valid: int = 6, test: int = 6, seed: int = 0) -> Path:
    """Shards in which some clips lack a modality, the first training clip all but one."""
    rng = np.random.default_rng(seed)
    dims = Dims(audio="waveform", text=None, vision=VISION_WIDTH)
    with write_dataset(out, dims=dims, label_range=(-3.0, 3.0), samples_per_shard=8) as writer:
        counts: dict[Split, int] = {"train": train, "valid": valid, "test": test}
        for split, count in counts.items():
            for i in range(count):
                has = {"audio": i % 7 != 3, "text": i % 5 != 1, "vision": i % 6 != 2}
                sample = clip(rng, **has) if i else clip(rng, text=False, vision=False)
                packed = pack_sample(key=f"{split}{i:03d}", split=split, **sample)
                writer.add(split, packed)
    return out


def recipe(shards: Path, /, **changes: Any) -> Recipe:
    """A validated recipe with a tiny WavLM and Llama; `changes` are nested settings merged in, dropout is off."""
    values: dict[str, Any] = {
        "seed": 3,
        "precision": "fp32",
        "data": {"path": str(shards), "batch": 6, "workers": 0, "evaluation_batch": 4},
        "audio": {
            "config": {
                "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
                "conv_dim": [8] * 7, "feat_extract_norm": "layer", "do_stable_layer_norm": True,
                "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "num_buckets": 16,
                "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0,
            },
            "layer": -2,
            "tuning": "full",
        },
        "text": {
            "config": {
                "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
                "max_position_embeddings": 512,
            },
            "tuning": "full", "layers": 2, "vocabulary": 300,
        },
        "simulation": {"rollout": "prefix", "layer": -2, "projector_width": 16, "max_new_tokens": 4, "prompt": "Say:"},
        "fusion": {"width": 16, "dropout": 0.0, "attention_dropout": 0.0},
        "imagination": {"pooled_bottleneck": 8, "views_bottleneck": 8},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "schedule": {"name": "constant"},
        "training": {"epochs": 1},
        "zero": {"stage": 2, "persistence_threshold": 0, "bucket_elements": 100_000},
    }  # fmt: skip
    return validate(merge(values, changes))


def merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested update."""
    for key, value in changes.items():
        inner = values.get(key)
        values[key] = merge(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return values
