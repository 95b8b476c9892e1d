"""A Hugging Face folder from DeepSpeed's checkpoint: ours against zero_to_fp32 and save_pretrained.

    python tests/bench/convert.py [--stages 2 3] [--repeats 3] [--folder /tmp/convert] [--layers 22]

A Llama of 1.1 B parameters is saved by a real DeepSpeed engine of two ranks (bf16, moments of zero) unless it is there.
Each conversion to bf16 safetensors is a process of its own, both sides in turn; what they write is compared bit by bit.
Measured are the seconds of the whole process, imports included, and its most memory above a process that has only
imported torch: resident (ru_maxrss, which counts pages of mapped files) and anonymous (RssAnon, looked at every 10 ms).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

SIDES = ("ours", "theirs")
MIB, EVERY = 2**20, 0.01  # seconds between two looks at the memory


class Memory(threading.Thread):
    """Looks at this process's anonymous memory until told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.most = 0

    def run(self) -> None:
        while not self.done.is_set():
            self.most = max(self.most, status("RssAnon"))
            time.sleep(EVERY)


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def config_of(layers: int) -> Any:
    """TinyLlama's shape."""
    from transformers import LlamaConfig  # noqa: PLC0415  takes seconds

    heads: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 4}
    return LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, dtype=torch.bfloat16, **heads
    )


def save(folder: Path, stage: int, layers: int) -> None:
    """One rank of the engine that writes the checkpoint."""
    from sharding import world  # noqa: PLC0415
    from sharding.ops import prepare_ops  # noqa: PLC0415

    prepare_ops(print)
    joined = world.read_world(os.environ)
    assert joined is not None
    world.join(joined, with_deepspeed=True)
    from transformers import LlamaForCausalLM  # noqa: PLC0415

    from sharding.engine_state import create_moments, set_adam_step  # noqa: PLC0415
    from sharding.zero import ZeroSettings, build_engine  # noqa: PLC0415

    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config_of(layers))
    model = model.bfloat16().to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    settings = ZeroSettings(stage=stage, bucket_elements=1_000_000, persistence_threshold=0)
    engine = build_engine(model, optimizer, settings, micro_batch=1, accumulation=1, clip_norm=0.0, bf16=True)
    create_moments(engine)
    set_adam_step(engine, 1)
    engine.save_checkpoint(str(folder), tag="tag")
    world.leave()
    os._exit(0)


def convert(side: str, checkpoint: Path, out: Path, layers: int) -> None:
    """One conversion; tells what it took on standard output."""
    start, resident = status("RssAnon"), status("VmHWM")
    memory = Memory()
    memory.start()
    out.mkdir()
    if side == "ours":
        from tools.convert import deepspeed_native  # noqa: PLC0415
        from tools.convert.safetensors_shards import write_shards  # noqa: PLC0415

        write_shards(out, deepspeed_native.read(checkpoint).weights, dtype=torch.bfloat16)
    else:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # noqa: PLC0415
        from transformers import LlamaForCausalLM  # noqa: PLC0415

        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
        with torch.device("meta"):
            model: Any = LlamaForCausalLM(config_of(layers))
        model.load_state_dict(weights, assign=True)
        model.bfloat16().save_pretrained(out)
    memory.done.set()
    memory.join()
    print(json.dumps({"anonymous": memory.most - start, "resident": status("VmHWM") - resident}))


def measure(side: str, checkpoint: Path, out: Path, layers: int) -> dict[str, float]:
    """Runs one conversion."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--side", side, "--folder", str(checkpoint), "--out", str(out)]
    started = time.perf_counter()
    done = subprocess.run([*command, "--layers", str(layers)], check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, **json.loads(done.stdout.splitlines()[-1])}


def equal(one: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors."""
    from safetensors import safe_open  # noqa: PLC0415

    files = [safe_open(next(folder.glob("*.safetensors")), "pt") for folder in (one, other)]
    names = [set(file.keys()) for file in files]
    return names[0] == names[1] and all(
        torch.equal(*(file.get_tensor(name).view(torch.int16) for file in files)) for name in names[0]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/convert"))
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", type=int, help="for the ranks that this script starts: the ZeRO stage")
    parser.add_argument("--side", choices=SIDES, help="for the processes that this script starts")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.save is not None:
        save(arguments.folder, arguments.save, arguments.layers)
    if arguments.side:
        convert(arguments.side, arguments.folder, arguments.out, arguments.layers)
        return
    from sharding.launch import run_local  # noqa: PLC0415

    print("| ZeRO | side | seconds | anonymous, MiB | resident, MiB | largest file, MiB |\n|---|---|---|---|---|---|")
    for stage in arguments.stages:
        checkpoint = arguments.folder / f"zero{stage}"
        if not (checkpoint / "latest").is_file():
            command = [sys.executable, __file__, "--save", str(stage), "--folder", str(checkpoint)]
            if run_local([*command, "--layers", str(arguments.layers)], 2, arguments.folder / "logs"):
                sys.exit(f"saving failed, see {arguments.folder / 'logs'}")
        outs = {side: arguments.folder / side for side in SIDES}
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(arguments.repeats):
            for side in SIDES:
                found[side].append(measure(side, checkpoint, outs[side], arguments.layers))
        assert equal(*outs.values())
        size = max(path.stat().st_size for path in outs["ours"].iterdir())
        middle = {
            side: {name: statistics.median(one[name] for one in rows) for name in rows[0]}
            for side, rows in found.items()
        }
        for side, row in middle.items():
            each = ", ".join(f"{one['seconds']:.1f}" for one in found[side])
            memory = f"{row['anonymous'] / MIB:.0f} | {row['resident'] / MIB:.0f}"
            print(f"| {stage} | {side} | {row['seconds']:.1f} ({each}) | {memory} | {size / MIB:.0f} |")
        ours, theirs = middle.values()
        print(
            f"stage {stage}: {theirs['seconds'] / ours['seconds']:.2f} times as fast; of the largest file, anonymous "
            f"{ours['anonymous'] / size:.2f} (theirs {theirs['anonymous'] / size:.2f}), resident "
            f"{ours['resident'] / size:.2f} (theirs {theirs['resident'] / size:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
