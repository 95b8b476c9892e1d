"""Whether all ranks run the same software on the same recipe."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from dist_train.recipe import Recipe
from slurm.preflight.findings import Finding, findings_of

CHECK = "versions"
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes")
OURS = ("sharding", "dist_train", "slurm", "tools")
DRIVER = "driver"  # told by nvidia-smi; others within a CUDA version work together
SUFFIXES = (".py", ".j2")


def versions(recipe: Recipe) -> dict[str, str]:
    """What decides how this rank computes: versions, and hashes of code and recipe."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    found["torch"] = torch.__version__  # with the build: 2.13.0+cpu
    found["CUDA"] = torch.version.cuda or "none"
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    found["code"] = code_hash(Path(__file__).parents[2])
    found["recipe"] = hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:12]
    return found


def code_hash(root: Path) -> str:
    """Of the files of our packages below `root`: their places and bytes."""
    total = hashlib.sha256()
    for package in OURS:
        for path in sorted((root / package).rglob("*")):
            if path.suffix in SUFFIXES:
                data = path.read_bytes()
                total.update(f"{path.relative_to(root).as_posix()}\t{len(data)}\n".encode() + data)
    return total.hexdigest()[:12]


def judge_versions(
    found: Mapping[int, Mapping[str, str]], drivers: Mapping[str, str], nodes: Sequence[str]
) -> Iterator[Finding]:
    """Names the ranks whose versions are others than those of most, or of rank 0 where none are most.

    Args:
        found: of each rank, see `versions`.
        drivers: of the GPUs, by node.
        nodes: name of the node of each rank.
    """
    rows = {rank: dict(one) for rank, one in found.items()}
    for rank, row in rows.items():
        if nodes[rank] in drivers:
            row[DRIVER] = drivers[nodes[rank]]
    for name in dict.fromkeys(name for row in rows.values() for name in row):
        values = {rank: row.get(name, "none") for rank, row in rows.items()}
        usual = Counter(values.values()).most_common(1)[0][0]  # of equally many, the first
        others = {rank: value for rank, value in values.items() if value != usual}
        problems = {rank: f"{name} is {value}, elsewhere {usual}" for rank, value in others.items()}
        remedy = "Use the same environment, code and recipe on all nodes."
        yield from findings_of(nodes, CHECK, problems, remedy, "note" if name == DRIVER else "stop")
