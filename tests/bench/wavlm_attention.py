"""WavLM's encoder with transformers' attention and with ours, side by side: time and peak memory of a training step.

    python tests/bench/wavlm_attention.py [--layers 4] [--seconds 30] [--clips 1] [--tuning full lora] [--dropout 0.1 0]
    python tests/bench/wavlm_attention.py --device cuda --layers 24 --clips 8      # bf16

A step is forward and backward of the layers of WavLM-Large's encoder (width 1024, 16 heads, random weights); the
convolutions before them are the same in both and left out. `lora` adapts the feed-forward layers, because adapters on
the projections learn nothing in the stock attention. WavLM-Large has dropout 0.1 on attention weights. The stock
attention looks up its table of biases once per forward, so a model of few layers flatters ours a little.

Each side is a process of its own; they take turns, and each side's best step counts. Time is that of the processor on
CPU (other programs disturb it least), that of the clock on CUDA. Peak memory is what the process takes above its start,
before it has weights: the kernel's high-water mark of resident memory on CPU, the allocator's on CUDA. Exit code 1 if a
target is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import WavLMConfig, WavLMModel

from dist_train.speech_encoders import shortest_waveform
from dist_train.wavlm import use_own_attention

SIDES = ("stock", "ours")
FASTER, SMALLER = 1.3, 0.6  # targets: step time at least, peak memory at most
SAMPLE_RATE = 16_000
MIB = 2**20


class Meter:
    """Peak memory in bytes above what the process took at the start."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.start = 0 if device == "cuda" else memory("VmRSS")

    def reset(self) -> None:
        """Forgets earlier peaks."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Since the last reset."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else memory("VmHWM") - self.start


def memory(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def build(case: dict[str, Any]) -> nn.Module:
    """The encoder, in training mode."""
    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=1024,
        num_attention_heads=16,
        intermediate_size=4096,
        num_hidden_layers=case["layers"],
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        layerdrop=0.0,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=case["dropout"],
    )
    encoder: Any = WavLMModel(config).encoder
    encoder.pos_conv_embed = nn.Identity()
    if case["side"] == "ours":
        use_own_attention(encoder)
    if case["tuning"] == "lora":
        targets = ["intermediate_dense", "output_dense"]
        encoder = inject_adapter_in_model(LoraConfig(r=8, target_modules=targets), encoder)
    return encoder.to(case["device"], torch.bfloat16 if case["device"] == "cuda" else torch.float32).train()


def work(case: dict[str, Any]) -> None:
    """One side: builds the encoder, then for each line on stdin takes a step and prints what it cost, as JSON."""
    meter = Meter(case["device"])
    encoder = build(case)
    dtype = next(encoder.parameters()).dtype
    clock = time.perf_counter if case["device"] == "cuda" else time.process_time
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(case["clips"], case["frames"], 1024, generator=generator).to(case["device"], dtype)
    mask = torch.ones(case["clips"], case["frames"], dtype=torch.bool, device=case["device"])
    for _ in sys.stdin:
        encoder.zero_grad()
        meter.reset()
        start = clock()
        output = encoder(states.clone(), attention_mask=mask).last_hidden_state
        output.square().mean().backward()
        norms = [p.grad.float().norm().item() for p in encoder.parameters() if p.grad is not None]  # waits for CUDA
        seconds = clock() - start
        print(json.dumps({"seconds": seconds, "peak": meter.peak(), "gradient": sum(norms)}), flush=True)


def compare(case: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Both sides, in turns."""
    command = [sys.executable, __file__, "--work"]
    sides = {
        side: subprocess.Popen(
            [*command, json.dumps({**case, "side": side})], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for side in SIDES
    }
    steps: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for _ in range(1 + rounds):  # the first pays for allocation
        for side, process in sides.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("step\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                sys.exit(f"{side}: the process ended with {process.wait()}")
            steps[side].append(json.loads(line))
    for process in sides.values():
        process.communicate()
    result: dict[str, Any] = dict(case)
    for side, taken in steps.items():
        result[f"{side}_seconds"] = min(step["seconds"] for step in taken[1:])
        result[f"{side}_peak_bytes"] = max(step["peak"] for step in taken)
    result["speed_ratio"] = result["stock_seconds"] / result["ours_seconds"]
    result["memory_ratio"] = result["ours_peak_bytes"] / result["stock_peak_bytes"]
    if not case["dropout"]:
        stock, ours = (steps[side][0]["gradient"] for side in SIDES)
        result["gradient_difference"] = abs(ours / stock - 1)
    return result


def hardware(device: str) -> str:
    """What it ran on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} thread(s)"


def show(results: list[dict[str, Any]]) -> None:
    """The table."""
    print("| tuning | attention dropout | stock s | ours s | faster | stock MiB | ours MiB | memory |")
    print("|---|---|---|---|---|---|---|---|")
    for row in results:
        print(
            f"| {row['tuning']} | {row['dropout']} | {row['stock_seconds']:.2f} | {row['ours_seconds']:.2f} "
            f"| {row['speed_ratio']:.2f}x | {row['stock_peak_bytes'] / MIB:.0f} | {row['ours_peak_bytes'] / MIB:.0f} "
            f"| {row['memory_ratio']:.2f}x |"
        )


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(sys.argv[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--layers", type=int, default=4, help="of 24 in WavLM-Large")
    parser.add_argument("--seconds", type=float, default=30.0, help="length of a clip")
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--tuning", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.1, 0.0], help="on attention weights")
    parser.add_argument("--rounds", type=int, default=3, help="steps of each side; the best counts")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()

    config, frames = WavLMConfig(), 1
    while shortest_waveform(config, frames=frames + 1) <= arguments.seconds * SAMPLE_RATE:
        frames += 1
    shared = {"device": arguments.device, "layers": arguments.layers, "clips": arguments.clips, "frames": frames}
    results = [
        compare({**shared, "tuning": tuning, "dropout": dropout}, arguments.rounds)
        for tuning in arguments.tuning
        for dropout in arguments.dropout
    ]
    record = {
        "what": "WavLM-Large encoder, training step, stock against own attention",
        "hardware": hardware(arguments.device),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "results": results,
    }
    print(f"{record['hardware']}, torch {record['torch']}, {record['date']}")
    print(f"{arguments.clips} clip(s) of {arguments.seconds:g} s ({frames} frames), {arguments.layers} layers of 24\n")
    show(results)
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")
    reached = all(row["speed_ratio"] >= FASTER and row["memory_ratio"] <= SMALLER for row in results)
    print(f"\n{'yes' if reached else 'NO '} at least {FASTER}x faster with at most {SMALLER}x the memory, in every row")
    sys.exit(0 if reached else 1)


if __name__ == "__main__":
    main()
