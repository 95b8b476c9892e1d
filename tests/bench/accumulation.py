"""What exact losses over micro-steps cost: one optimizer step over the same clips, in 1, 2, 4 and 8 micro-steps.

    python tests/bench/accumulation.py [--clips 16] [--rounds 3]

`exact` runs every micro-step but one forward twice (gradient caching), `approximate` runs each once and compares only
the clips of one micro-step. Printed are processor seconds (the best of some rounds that take turns) over those of a
single micro-step, what the planner foretells of that ratio (FLOPs), and the tensors held at the peak. Fewer clips at
once also mean less padding, so the same number of micro-steps without replays is the fairer reference: `approximate`.
"""

from __future__ import annotations

import argparse
import copy
import time
from functools import partial
from typing import Any

import numpy as np
import torch

from dist_train.build import build_model
from dist_train.plan import Planner
from dist_train.plan_corpus import MOSEI_WIDTHS, clip_of, mosei
from dist_train.plan_pretrained import Sizes
from dist_train.recipe import Recipe, validate
from dist_train.step import Stepper
from sharding.hardware import PROFILES
from sharding.launch import free_port
from sharding.meter import Meter
from sharding.ops import prepare_ops
from sharding.world import World, join
from tools.bench_gpu import random_batch, random_stepper

SPLITS = (1, 2, 4, 8)
MODES = ("exact", "approximate")
VOCABULARY = 1000


def recipe_of(mode: str, micro_steps: int) -> Recipe:
    """A small double flow: WavLM frozen, LoRA in the language model, answers at hand."""
    wavlm: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    wavlm |= {"num_attention_heads": 4, "conv_dim": [64] * 7}
    wavlm |= {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
    llama = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8}
    return validate(
        {
            "precision": "fp32",
            "data": {"path": "not needed", "workers": 0},
            "widths": MOSEI_WIDTHS,
            "audio": {"config": wavlm, "layer": -1},
            "text": {"config": llama, "tuning": "lora"},
            "simulation": {"rollout": "cached", "max_new_tokens": 32},
            "training": {"accumulation": micro_steps, "accumulated_loss": mode},
            "zero": {"stage": 2, "bucket_elements": 1_000_000},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=16, help="of a step, at least 8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of lengths and content")
    arguments = parser.parse_args()
    prepare_ops(print)
    join(World(0, 1, 0, "127.0.0.1", free_port()), with_deepspeed=True)
    draw = np.random.default_rng(arguments.seed)

    steps: dict[tuple[str, int], Any] = {}
    foretold: dict[tuple[str, int], float] = {}
    chosen = draw.choice(16_000, arguments.clips, replace=False)
    for mode in MODES:
        for count in SPLITS:
            recipe = recipe_of(mode, count)
            model = build_model(recipe, Sizes(VOCABULARY))  # type: ignore[arg-type]
            columns = mosei(recipe)
            parts = [[clip_of(recipe, columns, int(i)) for i in part] for part in np.array_split(chosen, count)]
            batches = [random_batch(recipe, model, part, np.random.default_rng(1), VOCABULARY) for part in parts]
            stepper = random_stepper(recipe, model, arguments.clips, count)
            rows = [[len(part)] for part in parts]
            steps[mode, count] = partial(run, stepper, batches, rows, arguments.clips)
            planner = Planner(recipe, Sizes(VOCABULARY), PROFILES["cpu"], 1, 1)
            foretold[mode, count] = sum(planner.predict(parts).flops.values())
    best: dict[tuple[str, int], float] = {}
    for number in range(arguments.rounds + 1):  # the first pays for allocation
        for key, step in steps.items():
            started = time.process_time()
            step(number)
            if number:
                best[key] = min(best.get(key, float("inf")), time.process_time() - started)
    print(f"{arguments.clips} clips, {torch.get_num_threads()} threads\n")
    print("| losses | micro-steps | seconds | over one micro-step | foretold | peak, MiB |\n|---|---|---|---|---|---|")
    for (mode, count), seconds in best.items():
        left = Meter().now
        with Meter() as meter:
            steps[mode, count](arguments.rounds + 1)
        print(
            f"| {mode} | {count} | {seconds:.2f} | {seconds / best[mode, 1]:.2f} | "
            f"{foretold[mode, count] / foretold[mode, 1]:.2f} | {(meter.peak - left) / 2**20:.0f} |",
            flush=True,
        )


def run(stepper: Stepper, batches: list[Any], rows: list[list[int]], clips: int, number: int) -> None:
    """One optimizer step."""
    given = iter([copy.copy(batch) for batch in batches])
    stepper.run(partial(next, given), rows, clips, step=number, epoch=0)


if __name__ == "__main__":
    main()
