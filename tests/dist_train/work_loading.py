"""What ranks do for the tests of loading."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dist_train.build import build_model, build_training
from dist_train.evaluate import same_bases
from dist_train.llm import load_tokenizer
from dist_train.recipe import load_recipe
from sharding.checkpoint import fingerprints
from sharding.collectives import gather_objects
from sharding.errors import UserErrors


def mapping_of(address: int) -> dict[str, Any]:
    """The file that this address is mapped from, and KiB of its pages that this process holds for itself."""
    found: dict[str, Any] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)", line)
        if head:
            inside = int(head[1], 16) <= address < int(head[2], 16)
            if inside:
                found["file"] = head[3]
        elif inside and line.startswith("Private_Dirty:"):
            found["dirty"] = int(line.split()[1])
    return found


def frozen_pages(folder: Path, recipe: str, tokenizer: str) -> list[dict[str, Any]]:
    """Where each rank's frozen weights lie once the engine is built."""
    made = load_recipe(Path(recipe))
    model = build_model(made, load_tokenizer(tokenizer))
    before = same_bases(fingerprints(model))
    engine = build_training(made, model, micro_batch=1)
    weight = next(p for n, p in engine.module.named_parameters() if n.endswith("layers.1.mlp.up_proj.weight"))
    assert not hasattr(weight, "ds_optim_param") and fingerprints(engine.module) == before
    return gather_objects(mapping_of(weight.data_ptr()))


def other_bases(folder: Path) -> str:
    """What rank 0 is told where the ranks read other frozen weights."""
    try:
        same_bases({"llm": f"base {dist.get_rank()}"})
    except UserErrors as error:
        return "; ".join(map(str, error.errors))
    return ""
