"""What VGMR costs: one optimizer step with `refine: vgmr` beside one without, over the same clips.

    python tests/bench/refine.py [--clips 16] [--rounds 5]

Once with the whole double flow (WavLM frozen, LoRA in the language model, answers at hand), once with the fusion
network alone on features of CMU-MOSEI's widths. Printed are how often a step calls the language model and the fusion
network's head, processor seconds (the best of some rounds that take turns), and the ratio of the two steps.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import torch

from dist_train.build import build_collator, build_model
from dist_train.plan_corpus import Clip, clip_of, mosei
from dist_train.plan_pretrained import Sizes
from dist_train.recipe import Recipe, validate
from sharding.launch import free_port
from sharding.ops import prepare_ops
from sharding.world import World, join
from tests.bench.accumulation import VOCABULARY, recipe_of, run
from tools.bench_gpu import random_batch, random_stepper

KINDS = ("none", "vgmr")
ALONE = {"audio": {"input": "features"}, "text": {"input": "features"}, "simulation": {"rollout": "features"}}
WIDTHS = {"audio": 1024, "text": 4096, "simulated": 4096, "vision": 1024}  # WavLM, Vicuna twice, the paper's faces
SAMPLES_PER_FRAME = 320


def recipes() -> dict[str, Recipe]:
    """What is trained, without VGMR."""
    whole = recipe_of("exact", 1)
    alone = validate({"precision": "fp32", "data": {"path": "not needed", "workers": 0}, "widths": WIDTHS, **ALONE})
    return {"the whole double flow": whole, "the fusion network alone": alone}


def features(clip: Clip, draw: np.random.Generator) -> dict[str, Any]:
    """What shards give of such a clip, with random content."""
    lengths = {"audio": round(clip.audio / SAMPLES_PER_FRAME), "text": clip.text, "vision": clip.vision}
    lengths["simulated"] = clip.text
    arrays = {name: draw.standard_normal((n, WIDTHS[name])).astype(np.float32) for name, n in lengths.items()}
    shown = {**arrays, "text_features": arrays["text"], "text": None}
    return {"key": "k", "index": 0, "real": True, "label": draw.uniform(-3, 3), **shown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=16, help="of a step")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    prepare_ops(print)
    join(World(0, 1, 0, "127.0.0.1", free_port()), with_deepspeed=True)
    chosen = np.random.default_rng(0).choice(16_000, arguments.clips, replace=False)
    print(f"{arguments.clips} clips, {torch.get_num_threads()} threads\n")
    print("| trained | refine | language model | head | seconds | ratio |\n|---|---|---|---|---|---|")
    for name, plain in recipes().items():
        steps: dict[str, Any] = {}
        calls: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        for kind in KINDS:
            recipe = plain.model_copy(update={"refine": plain.refine.model_copy(update={"kind": kind})})
            model = build_model(recipe, Sizes(VOCABULARY))  # type: ignore[arg-type]
            columns = mosei(recipe)
            clips = [clip_of(recipe, columns, int(i)) for i in chosen]
            draw = np.random.default_rng(1)
            if recipe.reads_language_model:
                batch = random_batch(recipe, model, clips, draw, VOCABULARY)
            else:
                batch = build_collator(recipe, None, model)([features(clip, draw) for clip in clips])
            counted = {"head": model.fusion.head}
            if recipe.reads_language_model:
                counted["language model"] = next(m for n, m in model.llm.named_modules() if n.endswith("layers.0"))
            for part, module in counted.items():
                module.register_forward_hook(lambda *_, part=part, tally=calls[kind]: tally.update([part]))
            stepper = random_stepper(recipe, model, arguments.clips, 1)
            steps[kind] = partial(run, stepper, [batch], [[arguments.clips]], arguments.clips)
        best: dict[str, float] = {}
        for number in range(arguments.rounds + 1):  # the first pays for allocation
            for kind, step in steps.items():
                calls[kind].clear()
                started = time.process_time()
                step(number)
                if number:
                    best[kind] = min(best.get(kind, float("inf")), time.process_time() - started)
        for kind, seconds in best.items():
            counts = f"{calls[kind]['language model']} | {calls[kind]['head']}"
            print(f"| {name} | {kind} | {counts} | {seconds:.2f} | {seconds / best['none']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
