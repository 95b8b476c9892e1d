"""Training steps of the double flow at real size on one device: Vicuna-7B's and WavLM-Large's shapes, random weights.

    python -m tools.bench_gpu                                    # every case on this GPU, then the two comparisons
    python -m tools.bench_gpu lora nf4 --clips 12 --steps 8 --output bench.jsonl --trace traces
    python -m tools.bench_gpu --device cpu --size tiny --steps 2  # does it run?

Clips as long as CMU-MOSEI's, drawn anew for each step. A case is a process of its own and goes through the trainer's
own step: one engine, packed pass, losses, update. Per case: the median step, clips and language model tokens per
second, MFU by the honest count (dist_train.flops) over the peak that a large matrix product reaches on this device, the
allocator's peak, where the time goes, and what the planner foretold for the same clips. Then, from a checkout, the
packed pass against two padded ones and WavLM's attention against the stock one (tests/bench).
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dist_train.batch import Batch, pad
from dist_train.build import build_model, build_training
from dist_train.flops import flop_rates, matrix_rate
from dist_train.missing import draw_dropped
from dist_train.model import DoubleFlow
from dist_train.phases import Phases, measured
from dist_train.plan import Planner, here
from dist_train.plan_corpus import MOSEI_WIDTHS, clip_of, mosei
from dist_train.plan_model import Clip
from dist_train.plan_pretrained import KNOWN, Sizes
from dist_train.recipe import Recipe, validate
from dist_train.run_directory import environment
from dist_train.step import Stepper
from sharding.agreement import Agreement
from sharding.census import Census
from sharding.hardware import GIB, PROFILES
from sharding.launch import free_port
from sharding.ops import prepare_ops
from sharding.world import World, join

LORA = {"text": {"tuning": "lora"}, "simulation": {"rollout": "cached"}}
CASES: dict[str, dict[str, Any]] = {
    "lora": LORA,  # the joint recipe: answers at hand, one packed pass
    "lora_checkpointed": {**LORA, "text": {"tuning": "lora", "activation_checkpointing": True}},
    "lora_both": {**LORA, "audio": {"tuning": "lora"}},
    "prefix": {**LORA, "simulation": {"rollout": "prefix"}},
    "generate": {**LORA, "simulation": {"rollout": "generate"}},
    "generate_beam4": {**LORA, "simulation": {"rollout": "generate", "beams": 4}},
    "int8": {**LORA, "text": {"tuning": "lora", "quantisation": "int8"}},
    "int8_threshold0": {**LORA, "text": {"tuning": "lora", "quantisation": "int8", "int8_threshold": 0.0}},
    "nf4": {**LORA, "text": {"tuning": "lora", "quantisation": "nf4"}},
}
ANSWER = 32  # tokens that a rollout decodes: about what is said in 7.3 s
TINY: dict[str, dict[str, Any]] = {
    "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2},
    "audio": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "conv_dim": [64] * 7, "feat_extract_norm": "layer", "do_stable_layer_norm": True,
    },
}  # fmt: skip
COMPARISONS = {  # scripts of a checkout, with what makes them real-size
    "tests/bench/packed.py": ["--hidden", "4096", "--layers", "32", "--clips", "12", "--batches", "2"],
    "tests/bench/wavlm_attention.py": ["--layers", "24", "--clips", "8"],
}
VOCABULARY = 32_000


def recipe_of(case: str, size: str, precision: str) -> Recipe:
    """The joint recipe at this size, with the case's changes."""
    real: dict[str, dict[str, Any]] = {"text": KNOWN["lmsys/vicuna-7b-v1.5"], "audio": KNOWN["microsoft/wavlm-large"]}
    shapes = real if size == "real" else TINY
    values: dict[str, Any] = {
        "precision": precision,
        "data": {"path": "not needed", "workers": 0},
        "widths": MOSEI_WIDTHS,
        "audio": {"layer": -2 if size == "tiny" else -5},
        "text": {},
        "simulation": {"max_new_tokens": ANSWER},
        "zero": {"stage": 2},
    }
    for part, changes in CASES[case].items():
        values[part] = {**values[part], **changes}
    for part, shape in shapes.items():
        values[part]["config"] = {key: value for key, value in shape.items() if key != "model_type"}
    return validate(values)


def random_batch(
    recipe: Recipe, model: DoubleFlow, clips: list[Clip], draw: np.random.Generator, vocabulary: int
) -> Batch:
    """The micro-batch that `Collator` makes of such clips, with random content."""

    def floats(length: int, width: int | None) -> np.ndarray:
        return draw.standard_normal(length if width is None else (length, width)).astype(np.float32) / 10

    audio = pad([floats(clip.audio, None) for clip in clips], None, model.audio.minimum_samples)
    text = pad([draw.integers(3, vocabulary, clip.text) for clip in clips], None, 1)
    vision = pad([floats(clip.vision, recipe.widths.vision) for clip in clips], recipe.widths.vision, 1)
    answer = pad([draw.integers(3, vocabulary, clip.answer) for clip in clips], None, 1)
    batch = Batch(
        audio=audio[0], audio_mask=audio[1], audio_present=audio[2],
        text=text[0].long(), text_mask=text[1], text_present=text[2],
        vision=vision[0], vision_mask=vision[1], vision_present=vision[2],
        label=torch.from_numpy(draw.uniform(-3, 3, len(clips)).astype(np.float32)),
        real=torch.ones(len(clips), dtype=torch.bool),
        index=torch.arange(len(clips)),
        dropped=draw_dropped(recipe.missing, torch.ones(len(clips), 3), range(len(clips)), 0, 0),
        set_aside=[],
    )  # fmt: skip
    if recipe.simulation.rollout == "cached":
        batch["answer"], batch["answer_mask"] = answer[0].long(), answer[1]
    return batch


def random_stepper(recipe: Recipe, model: DoubleFlow, clips: int, micro_steps: int = 1) -> Stepper:
    """Makes optimizer steps over so many clips; random weights need not all learn."""
    engine = build_training(recipe, model, micro_batch=-(-clips // micro_steps), accumulation=micro_steps)
    return Stepper(
        engine,
        recipe.loss,
        exact=recipe.training.accumulated_loss == "exact",
        keys=[f"clip {number}" for number in range(clips)],
        seed=recipe.seed,
        agreement=Agreement(engine.module, 0),
        census=Census(engine.module, steps=1, excused={"": "random weights"}),
    )


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """New tensors lie on the device and have the type: 7 billion random fp32 weights on a host take minutes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def run_case(case: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Some steps of one case in this process; what was measured."""
    device = torch.device(arguments.device)
    cuda = device.type == "cuda"
    recipe = recipe_of(case, arguments.size, "bf16" if cuda else "fp32")
    prepare_ops(lambda text: None)
    join(World(0, 1, 0, "127.0.0.1", free_port()), with_deepspeed=True)
    peak_rate = matrix_rate(recipe.dtype, device)
    with made_on(device, recipe.dtype):
        model = build_model(recipe, Sizes(VOCABULARY))  # type: ignore[arg-type]
    columns = mosei(recipe)
    draw = np.random.default_rng(arguments.seed)
    steps = arguments.warm_up + arguments.steps
    chosen = draw.choice(len(columns.key), (steps, arguments.clips), replace=False)
    clips = [[clip_of(recipe, columns, int(index)) for index in row] for row in chosen]
    batches = [random_batch(recipe, model, row, draw, VOCABULARY) for row in clips]
    profile = PROFILES[here()]
    by_length = sorted(clips, key=lambda row: max(clip.audio for clip in row))
    rates = flop_rates(recipe, Sizes(VOCABULARY), profile, [by_length[len(by_length) // 2], by_length[-1]])
    planner = Planner(recipe, Sizes(VOCABULARY), profile, 1, 1)
    stepper = random_stepper(recipe, model, arguments.clips)
    rows: list[dict[str, Any]] = []
    for number, (batch, held) in enumerate(zip(batches, clips, strict=True)):
        if cuda and number == arguments.warm_up:
            torch.cuda.reset_peak_memory_stats()
        phases, started = Phases(), time.perf_counter()
        with measured(phases), traced(arguments.trace if number == steps - 1 else None, case):
            found = stepper.run(partial(copy.copy, batch), [[arguments.clips]], arguments.clips, step=number, epoch=0)
        shares = phases.read()  # waits for the device
        seconds = time.perf_counter() - started
        flops = rates.of([(len(held), max(clip.audio for clip in held))], found.passages)
        rows.append({"seconds": seconds, "flops": flops, "tokens": found.tokens, "phases": shares, "loss": found.loss})
    rows = rows[arguments.warm_up : -1 if arguments.trace and arguments.steps > 1 else None]
    total = sum(row["seconds"] for row in rows)
    longest = max(clips[arguments.warm_up :], key=lambda row: max(clip.audio for clip in row))
    typical = by_length[len(by_length) // 2]
    foretold = planner.predict([longest], typical=[typical])
    return {
        "case": case,
        "step_seconds": statistics.median(row["seconds"] for row in rows),
        "clips_per_second": arguments.clips * len(rows) / total,
        "tokens_per_second": sum(row["tokens"] for row in rows) / total,
        "mfu": sum(row["flops"] for row in rows) / (total * peak_rate),
        "peak_flops": peak_rate,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "foretold_peak_bytes": foretold.peak_bytes,
        "foretold_step_seconds": foretold.seconds["step"],
        "phases": {name: sum(row["phases"].get(name, 0.0) for row in rows) / len(rows) for name in rows[0]["phases"]},
        "losses": [row["loss"] for row in rows],
        "clips": arguments.clips,
        "size": arguments.size,
    }


@contextmanager
def traced(folder: Path | None, case: str) -> Iterator[None]:
    """Writes a profiler trace into the folder, if there is one."""
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profiler:
        yield
    profiler.export_chrome_trace(str(folder / f"{case}.json.gz"))


def table_of(found: list[dict[str, Any]]) -> Table:
    """A line per case."""
    table = Table(title="Training steps on one device")
    for index, name in enumerate(
        ("case", "step, s", "foretold", "clips/s", "tokens/s", "MFU", "peak, GiB", "foretold", "decoding")
    ):
        table.add_column(name, justify="left" if index == 0 else "right")
    for one in found:
        if "error" in one:
            table.add_row(one["case"], one["error"])
            continue
        spent = sum(one["phases"].values())
        table.add_row(
            one["case"],
            f"{one['step_seconds']:.3f}",
            f"{one['foretold_step_seconds']:.3f}",
            f"{one['clips_per_second']:.1f}",
            f"{one['tokens_per_second']:.0f}",
            f"{one['mfu']:.1%}",
            "–" if one["peak_bytes"] is None else f"{one['peak_bytes'] / GIB:.1f}",
            f"{one['foretold_peak_bytes'] / GIB:.1f}",
            f"{one['phases'].get('rollout', 0.0) / spent:.0%}",
        )
    return table


def compare(device: str) -> None:
    """The two comparisons, at real size, where the scripts are."""
    root = Path(__file__).parent.parent
    for script, options in COMPARISONS.items():
        if not (root / script).is_file():
            Console().print(f"{script} is not here: run it from a checkout.")
            continue
        subprocess.run([sys.executable, str(root / script), "--device", device, *options], cwd=root, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[], help=f"of {', '.join(CASES)}; default: all, and comparisons")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=["real", "tiny"], default="real")
    parser.add_argument("--clips", type=int, default=12, help="per step (96 over 8 GPUs)")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3, help="steps before, not counted")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and content")
    parser.add_argument("--output", type=Path, help="file to append a JSON line per case to")
    parser.add_argument("--trace", type=Path, help="folder for a profiler trace of the last step of each case")
    parser.add_argument("--only", help=argparse.SUPPRESS)  # a case in the process that this one starts for it
    arguments = parser.parse_args()
    unknown = [case for case in arguments.cases if case not in CASES]
    if unknown:
        parser.error(f"{', '.join(unknown)}: the cases are {', '.join(CASES)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; to see that it runs: --device cpu --size tiny --steps 2")
    if arguments.only:
        print(json.dumps(run_case(arguments.only, arguments)), flush=True)
        os._exit(0)  # interpreter shutdown after a process group now and then aborts although all work is done
    around = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), **environment(1)}
    found = []
    for case in arguments.cases or CASES:
        command = [sys.executable, "-m", "tools.bench_gpu", *sys.argv[1:], "--only", case]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        lines = done.stdout.splitlines()
        result = json.loads(lines[-1]) if done.returncode == 0 else {"case": case, "error": f"code {done.returncode}"}
        found.append(result)
        Console().print(f"{case}: " + (result.get("error") or f"{result['step_seconds']:.3f} s per step"))
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(json.dumps({**result, **around}) + "\n")
    Console().print(around, table_of(found))
    if not arguments.cases and arguments.size == "real":
        compare(arguments.device)
    sys.exit(1 if any("error" in one for one in found) else 0)


if __name__ == "__main__":
    main()
