"""What loading a pretrained language model takes of a node's memory: a checkpoint of 2 GB in shards, several ranks.

    python tests/bench/loading.py [--ranks 2] [--folder /tmp/loading] [--layers 22]

A Llama of 1.1 B parameters (bf16, shards of 500 MB) is written to --folder unless it is there. Each case builds the
double-flow model around it in every rank, with LoRA, reads every weight once (the fingerprint of the frozen base), and
builds the DeepSpeed engine around it. Measured are seconds, the most memory that a rank holds for itself (private
pages) at any time, and the most that all ranks hold together (pages they share counted once), both above the start. The
obvious way reads the weights into fp32 in every rank, and casts them then.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

CASES: dict[str, dict[str, Any]] = {
    "the obvious way: fp32, then bf16": {"stage": 2, "quantisation": "none"},
    "bf16, ZeRO-2": {"stage": 2, "quantisation": "none"},
    "bf16, ZeRO-3": {"stage": 3, "quantisation": "none"},
    "int8, ZeRO-2": {"stage": 2, "quantisation": "int8"},
    "nf4, ZeRO-2": {"stage": 2, "quantisation": "nf4"},
    "nf4, ZeRO-3": {"stage": 3, "quantisation": "nf4"},
}
OBVIOUS = next(iter(CASES))
MIB, EVERY = 2**20, 0.03  # seconds between two looks at the memory


class Memory(threading.Thread):
    """Looks at this process's memory until told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.private = self.share = 0

    def run(self) -> None:
        while not self.done.is_set():
            self.look()
            time.sleep(EVERY)

    def look(self) -> None:
        fields = dict(line.split()[:2] for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
        held = {name: int(value) * 1024 for name, value in fields.items()}
        self.private = max(self.private, held["Private_Clean:"] + held["Private_Dirty:"])
        self.share = max(self.share, held["Pss:"])


def write_checkpoint(folder: Path, layers: int) -> None:
    """TinyLlama's shape, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415  takes seconds

    heads: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 4}
    config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, **heads)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.bfloat16().to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size="500MB")


def load(folder: Path, case: str) -> None:
    """One rank of one case; leaves what it measured in a file."""
    from sharding import world  # noqa: PLC0415
    from sharding.ops import prepare_ops  # noqa: PLC0415

    prepare_ops(print)
    joined = world.read_world(os.environ)
    assert joined is not None
    world.join(joined, with_deepspeed=True)
    from dist_train import llm  # noqa: PLC0415
    from dist_train.build import build_model, build_training  # noqa: PLC0415
    from dist_train.recipe import validate  # noqa: PLC0415
    from dist_train.tokenizer import train_tokenizer  # noqa: PLC0415
    from sharding.checkpoint import fingerprints  # noqa: PLC0415

    chosen = CASES[case]
    recipe = validate(
        {
            "precision": "bf16",
            "data": {"path": "none"},
            "audio": {"input": "features"},
            "text": {"pretrained": str(folder / "model"), "tuning": "lora", "quantisation": chosen["quantisation"]},
            "zero": {"stage": chosen["stage"], "bucket_elements": 1_000_000},
        }
    )
    if case == OBVIOUS:
        ours = llm.load_model

        def obvious(*arguments: Any, dtype: torch.dtype, **settings: Any) -> Any:
            model: Any = ours(*arguments, dtype=torch.float32, **settings)
            return model.to(dtype)

        llm.load_model = obvious
    tokenizer = train_tokenizer(["a film that was really good"] * 3, 300)
    memory = Memory()
    memory.look()
    private, share = memory.private, memory.share
    memory.start()
    started = time.perf_counter()
    model = build_model(recipe, tokenizer)
    fingerprints(model)
    build_training(recipe, model, micro_batch=1)
    seconds = time.perf_counter() - started
    memory.done.set()
    memory.join()
    memory.look()
    found = {"seconds": seconds, "private": memory.private - private, "share": memory.share - share}
    (folder / f"rank_{joined.rank}.json").write_text(json.dumps(found))
    world.leave()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/loading"))
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--case", help="for the ranks that this script starts")
    arguments = parser.parse_args()
    if arguments.case:
        load(arguments.folder, arguments.case)
    from sharding.launch import run_local  # noqa: PLC0415

    model = arguments.folder / "model"
    if not (model / "config.json").is_file():
        write_checkpoint(model, arguments.layers)
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    shards = len(list(model.glob("*.safetensors")))
    print(f"{size / MIB:.0f} MiB in {shards} shards, {arguments.ranks} ranks\n", flush=True)
    print("| case | seconds | private, most of a rank, MiB | all ranks, MiB | of the files |\n|---|---|---|---|---|")
    for case in CASES:
        command = [sys.executable, __file__, "--case", case, "--folder", str(arguments.folder)]
        code = run_local(command, arguments.ranks, arguments.folder / "logs")
        if code:
            sys.exit(f"{case} failed with {code}, see {arguments.folder / 'logs'}")
        found = [json.loads((arguments.folder / f"rank_{rank}.json").read_text()) for rank in range(arguments.ranks)]
        seconds, private = (max(one[name] for one in found) for name in ("seconds", "private"))
        together = sum(one["share"] for one in found)
        print(
            f"| {case} | {seconds:.1f} | {private / MIB:.0f} | {together / MIB:.0f} | {together / size:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
