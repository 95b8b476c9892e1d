"""What this machine can do, and what is missing for what: `dist-train doctor`. Judges what `tools.machine` finds."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sharding.errors import UserError
from slurm.probe import probe
from tools import machine

GIB = 2**30
State = Literal["found", "missing", "problem"]
LIBRARIES = {  # distribution -> (module, what it is needed for); without one of these nothing trains
    "deepspeed": ("deepspeed", "training"),
    "transformers": ("transformers", "WavLM and Llama"),
    "peft": ("peft", "LoRA"),
    "webdataset": ("webdataset", "shards"),
}
OPTIONAL = {
    "bitsandbytes": ("bitsandbytes", "adapters, 8- and 4-bit models, 8-bit AdamW"),
    "espeakng-loader": ("espeakng_loader", "the embedded corpus of the quickstart (extra: demo)"),
    "flash-attn": ("flash_attn", "the fastest attention on GPUs (extra: cuda); torch's own serves without it"),
}
UNUSED = {  # told because people look for them; this version has no use for them
    "submitit": ("submitit", "submission to Slurm is not part of this version"),
}


@dataclass(frozen=True)
class Check:
    """One line of the doctor.

    Attributes:
        state: `found`; `missing`; or `problem`: there, but not as it should be.
        needed_for: what cannot be done without it.
        remedy: the command that mends it, or what to do; empty when found.
        blocks: nothing can be trained on the CPU until this is mended.
    """

    group: str
    name: str
    state: State
    detail: str
    needed_for: str
    remedy: str = ""
    blocks: bool = False


def doctor(as_json: bool) -> None:
    """Print what this machine has, as a table or as JSON.

    Raises:
        UserError: training on the CPU is not possible; names what blocks it.
    """
    checks = examine()
    blocking = [check for check in checks if check.blocks]
    if as_json:
        rows = [dataclasses.asdict(check) for check in checks]
        print(json.dumps({"cpu_training": not blocking, "checks": rows}, indent=1, ensure_ascii=False))
    else:
        _print(checks)
    if blocking:
        names = ", ".join(check.name for check in blocking)
        remedies = "; ".join(dict.fromkeys(check.remedy for check in blocking))
        raise UserError("doctor", f"training is not possible here because of: {names}", f"Mend with: {remedies}")


def examine() -> list[Check]:
    """All checks, in the order of the table. Never raises for anything that is missing."""
    torch = machine.import_torch()
    gpus = list(machine.gpus())
    return [*_software(torch), *_devices(torch, gpus), *_deepspeed(), *_slurm(), *_machine(), *_unused()]


def _software(torch: Any) -> Iterator[Check]:
    group, use = "Software", "everything"
    new = sys.version_info >= (3, 11)
    version = f"{platform.python_version()} ({sys.executable})"
    yield Check(group, "Python", "found" if new else "problem", version, use, "" if new else "install 3.11+", not new)
    if isinstance(torch, str):
        yield Check(group, "torch", "missing", torch, use, _install("torch"), blocks=True)
    else:
        build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
        yield _ranged(Check(group, "torch", "found", f"{torch.__version__}, {build}", use))
    for name, (module, purpose) in {**LIBRARIES, **OPTIONAL}.items():
        found = machine.package_version(name, module)
        if found:
            yield _ranged(Check(group, name, "found", found, purpose))
        else:
            yield Check(group, name, "missing", "not installed", purpose, _install(name), blocks=name in LIBRARIES)
    known = (*LIBRARIES, "torch")
    others = [name for name in machine.requirements() if name not in known and not machine.package_version(name)]
    if others:
        remedy = "pip install " + " ".join(f"'{machine.requirements()[name]}'" for name in others)
        yield Check(group, "other libraries", "missing", ", ".join(others), use, remedy, blocks=True)


def _unused() -> Iterator[Check]:
    for name, (module, reason) in UNUSED.items():
        found = machine.package_version(name, module)
        yield Check("Not used yet", name, "found" if found else "missing", found or "not installed", reason)


def _devices(torch: Any, gpus: list[dict[str, str]]) -> Iterator[Check]:
    group, use = "Devices", "training 7B models"
    if not gpus:
        yield Check(
            group, "GPU", "missing", "no NVIDIA GPU (nvidia-smi)", use, "use a machine with an NVIDIA GPU and driver"
        )
    for gpu in gpus:
        bf16 = float(gpu["compute_cap"] or 0) >= 8
        detail = f"{gpu['name']}, {_gib(gpu['memory.total'])}, {_gib(gpu['memory.free'])} free, "
        detail += "bf16" if bf16 else "no bf16"
        yield Check(
            group,
            f"GPU {gpu['index']}",
            "found" if bf16 else "problem",
            detail,
            use,
            "" if bf16 else "a card of compute capability 8.0+, or precision: fp32",
        )
    if not isinstance(torch, str):
        if gpus:
            yield _cuda(torch, gpus)
        own = torch.distributed
        if own.is_available() and own.is_gloo_available():
            yield Check(group, "gloo", "found", "in torch", "ranks on CPUs")
        else:
            yield Check(group, "gloo", "missing", "not in this torch", "ranks on CPUs", _install("torch"), blocks=True)
        if own.is_available() and own.is_nccl_available():
            yield Check(group, "NCCL", "found", ".".join(map(str, torch.cuda.nccl.version())), "ranks on GPUs")
        else:
            remedy = "install a CUDA build of torch on the GPU machine"
            yield Check(group, "NCCL", "missing", "not in this torch", "ranks on GPUs", remedy)


def _cuda(torch: Any, gpus: list[dict[str, str]]) -> Check:
    """Whether this torch can use the GPUs that nvidia-smi lists, told without making a CUDA context."""
    row = ("Devices", "torch on GPU")
    use, driver, build = "training on these GPUs", gpus[0]["driver_cuda"], torch.version.cuda
    if build is None:
        return Check(
            *row, "problem", "torch is a CPU build", use, "install a CUDA build of torch (https://pytorch.org)"
        )
    if driver and int(driver.split(".")[0]) < int(build.split(".")[0]):
        remedy = f"install a torch built for CUDA {driver.split('.')[0]}, or a newer driver"
        return Check(*row, "problem", f"the driver knows CUDA {driver}, torch needs {build}", use, remedy)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    count = torch.cuda.device_count()
    detail = f"{count} of {len(gpus)} visible"
    if count:
        return Check(*row, "found", detail, use)
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Check(*row, "problem", detail, use, f"check CUDA_VISIBLE_DEVICES ({shown!r}) and the driver")


def _deepspeed() -> Iterator[Check]:
    group = "DeepSpeed"
    use = "compiling DeepSpeed's ops"
    for name, tool, remedy in (
        ("ninja", "ninja", _install("ninja")),
        ("C++ compiler", "c++", "apt-get install g++ (or load your cluster's compiler module)"),
    ):
        path = machine.executable(tool)
        if path:
            yield Check(group, name, "found", path, use)
        else:
            yield Check(group, name, "missing", "not on PATH or beside Python", use, remedy, blocks=True)
    cache = machine.ops_directory()
    for op, name, purpose, wait in (
        ("deepspeed_shm_comm", "CPU communication op", "ranks on CPUs", "about 30 s"),
        ("cpu_adam", "CPU Adam op", "not used yet (optimizer offload to CPU)", "about 50 s"),
    ):
        if any(cache.glob(f"{op}/*.so")) or any(machine.prebuilt(op)):
            yield Check(group, name, "found", "compiled", purpose)
        elif machine.writable(cache):
            yield Check(group, name, "missing", f"compiled at its first use ({wait})", purpose)
        else:
            detail, remedy = f"not compiled, {cache} not writable", "set TORCH_EXTENSIONS_DIR to a writable directory"
            yield Check(group, name, "problem", detail, purpose, remedy, blocks=op == "deepspeed_shm_comm")
    library, header = machine.libaio()
    use = "not used yet (offload to NVMe)"
    if library and header:
        yield Check(group, "libaio", "found", library, use)
    else:
        yield Check(group, "libaio", "missing", f"{library} without its header" if library else "not found", use)


def _slurm() -> Iterator[Check]:
    group, use = "Slurm", "ranks under srun, in jobs you submit"
    status = probe()
    if not status.found:
        yield Check(group, "Slurm", "missing", status.problem, use, "run on a login node of the cluster")
        return
    version = status.version or "version unknown"
    remedy = "check that slurmctld runs and SLURM_CONF is right (scontrol ping)"
    if status.problem:
        yield Check(group, "Slurm", "problem", f"{version}, {status.problem}", use, remedy)
    else:
        yield Check(group, "Slurm", "found", version, use)
    for partition in status.partitions:
        nodes = f"{partition.nodes} node{'s' * (partition.nodes != 1)}"
        states = ", ".join(f"{count} {state}" for state, count in partition.states.items())
        parts = [f"{nodes} ({states})" if states else nodes, *partition.gres, f"limit {partition.time_limit}"]
        name = f"partition {partition.name}{' (default)' if partition.default else ''}"
        yield Check(group, name, "found" if partition.available else "problem", ", ".join(parts), use)
    if status.reachable:
        remedy = "" if status.accounting else "ask the cluster's administrators for slurmdbd"
        detail = "sacct answers" if status.accounting else "sacct does not answer"
        yield Check(
            group, "accounting", "found" if status.accounting else "missing", detail, "the state of ended jobs", remedy
        )


def _machine() -> Iterator[Check]:
    group = "Machine"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check(group, "CPU cores", "found", f"{cores} usable, {platform.machine()}", "ranks and data loading")
    memory = machine.memory()
    yield Check(group, "memory", "found", f"{memory / GIB:.1f} GiB" if memory else "unknown", "models")
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(Path.cwd()).free
        small = free < 5 * GIB
        remedy = "free some, or give an --output elsewhere" if small else ""
        detail = f"{free / GIB:.1f} GiB free in {Path.cwd()}"
        yield Check(group, "disk", "problem" if small else "found", detail, "checkpoints and shards", remedy)
    shared = Path("/dev/shm")
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        small = usage.total < GIB
        remedy = "start the container with --shm-size=8g (or data.workers: 0)" if small else ""
        detail = f"{usage.total / GIB:.1f} GiB, {usage.free / GIB:.1f} free"
        yield Check(group, "/dev/shm", "problem" if small else "found", detail, "data loader workers, ranks", remedy)


def _print(checks: list[Check]) -> None:
    try:
        from rich.console import Console  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415
    except ImportError:
        for check in checks:
            print(f"{check.state:8} {check.name}: {check.detail} (for {check.needed_for}) {check.remedy}")
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("", "", "found", "needed for → what mends it"):
        table.add_column(column, overflow="fold")
    group = ""
    for check in checks:
        if check.group != group:
            group = check.group
            table.add_row("", Text(f"\n{group}" if table.row_count else group, style="bold"))
        mark, style = (
            ("✗", "red")
            if check.blocks
            else {"found": ("✓", "green"), "missing": ("–", "dim")}.get(check.state, ("!", "yellow"))
        )
        purpose = Text(check.needed_for, style="dim")
        if check.remedy:
            purpose.append(f"\n→ {check.remedy}", style="default" if check.state == "missing" else style)
        table.add_row(Text(mark, style=style), check.name, Text(check.detail), purpose)
    console = Console(highlight=False)
    console.print(table)
    if not any(check.blocks for check in checks):
        console.print("\nTraining on the CPU works here.")


def _install(name: str) -> str:
    how = "pip install --no-build-isolation" if name == "flash-attn" else "pip install"  # it compiles against torch
    return f"{how} '{machine.requirements(extras=True).get(name, name)}'"


def _ranged(check: Check) -> Check:
    """The check of an installed library, turned into a problem when its version lies outside the tested range."""
    wanted = machine.requirements(extras=True).get(check.name)
    with contextlib.suppress(ImportError):
        from packaging.requirements import Requirement  # noqa: PLC0415

        version = importlib.metadata.version(check.name)
        if wanted and not Requirement(wanted).specifier.contains(version, prereleases=True):
            detail = f"{check.detail}, outside the tested range"
            return dataclasses.replace(check, state="problem", detail=detail, remedy=f"pip install '{wanted}'")
    return check


def _gib(value: str) -> str:
    return f"{int(value) / 1024:.1f} GiB" if value.isdigit() else value
