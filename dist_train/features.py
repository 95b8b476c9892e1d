"""What decides extracted features: written beside them in dataset.json, and asked for by whoever trains on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from dist_train.keys import flat
from dist_train.recipe import Recipe
from sharding.errors import UserError
from sharding.shards import SOURCE

ABSENT = object()
SHOWN = 60  # characters of a value in a message


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe's keys that decide features, by section; weights are named by their fingerprints instead.

    What only decides how fast they come (batches, budget, attention kernels, ranks) is not among them.
    """
    simulation = recipe.simulation
    found: dict[str, Any] = {"precision": recipe.precision, "audio": {"input": recipe.audio.input}, "text": {}}
    found["simulation"] = {"rollout": "generate" if simulation.rollout == "cached" else simulation.rollout}
    if recipe.audio.input == "waveform":
        found["audio"] |= {"layer": recipe.audio.layer, **quantisation(recipe.audio)}
    if recipe.reads_language_model:
        found["text"] |= {"layers": recipe.text.layers, **quantisation(recipe.text)}
    if simulation.imagines:
        found["simulation"] |= {"layer": simulation.layer, "stack_frames": simulation.stack_frames}
    if simulation.decodes:
        found["simulation"] |= {name: getattr(simulation, name) for name in ("beams", "max_new_tokens", "prompt")}
    if recipe.data.on_bad_sample == "set_aside":  # else no clip is longer
        found["audio"]["max_seconds"], found["text"]["max_tokens"] = recipe.audio.max_seconds, recipe.text.max_tokens
    return found


def quantisation(settings: Any) -> dict[str, Any]:
    """How a pretrained part's weights are held."""
    kept = {"quantisation": settings.quantisation}
    return {**kept, "int8_threshold": settings.int8_threshold} if settings.quantisation == "int8" else kept


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over its vocabulary, special tokens, and rules where they can be had."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    for name in ("truncation", "padding"):  # of its last call
        rules.pop(name, None)
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    text = json.dumps([rules, sorted(tokenizer.get_vocab().items()), special], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(
    asked: Mapping[str, Any], found: Mapping[str, Any] | None, where: str, holds: str, remedy: str
) -> list[UserError]:
    """Entries of an identity that are not as asked for; what is not asked for may be anything.

    Args:
        asked, found: identities, nested or not; None: there is none.
        where: stands before the entries' names.
        holds: what has the other identity, for the message.
    """
    if found is None:
        return [UserError(where, f"is asked for, but {holds} does not tell how its features were made", remedy)]
    has = flat(dict(found))
    return [
        UserError(f"{where}.{key}", f"is {shown(value)}, but {holds} has {shown(has.get(key, ABSENT))}", remedy)
        for key, value in flat(dict(asked)).items()
        if has.get(key, ABSENT) != value
    ]


def shown(value: Any) -> str:
    """A value in a message."""
    text = "none" if value is ABSENT else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def pinned(features: Mapping[str, Any]) -> dict[str, Any]:
    """What a run asks for from its start on: all of its features' identity but the clips."""
    return {name: value for name, value in features.items() if name != SOURCE}
