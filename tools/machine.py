"""What this machine has: GPUs, memory, tools, compiled ops, Python packages. Only looks, and judges nothing.

No CUDA context is made on a card that somebody else may be using; torch is the only heavy import.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def import_torch() -> Any:
    """The module, or in words why there is none: a broken installation raises anything."""
    try:
        import torch  # noqa: PLC0415
        import torch.distributed  # noqa: PLC0415
    except ModuleNotFoundError as error:
        return "not installed" if error.name == "torch" else f"cannot be imported: {error}"
    except Exception as error:
        return f"cannot be imported: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return torch


def package_version(distribution: str, module: str | None = None) -> str | None:
    """Version of an installed distribution; None if it, or the module it should bring, is not there."""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    return version if module is None or has_module(module) else None


def requirements(extras: bool = False) -> dict[str, str]:
    """Requirements of the installed dist-train: name -> requirement; {} when run from a bare checkout."""
    try:
        lines = importlib.metadata.requires("dist-train") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    wanted = (line.split(";")[0].strip() for line in lines if extras or "extra ==" not in line)
    return {re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0].lower(): line for line in wanted}


def has_module(name: str) -> bool:
    """The module can be found, which does not yet mean imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def gpus() -> Iterator[dict[str, str]]:
    """One dict per GPU from nvidia-smi: index, name, memory (MiB), compute capability, the driver's CUDA version."""
    fields = ["index", "name", "memory.total", "memory.free", "compute_cap"]
    listed = _output(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"])
    if not listed:
        return
    match = re.search(r"CUDA Version:\s*([\d.]+)", _output(["nvidia-smi"]))
    for line in listed.splitlines():
        values = [value.strip() for value in line.split(",")]
        if len(values) == len(fields):
            capability = values[-1] if re.fullmatch(r"\d+(\.\d+)?", values[-1]) else ""
            yield {
                **dict(zip(fields, values, strict=True)),
                "compute_cap": capability,
                "driver_cuda": match[1] if match else "",
            }


def _output(command: list[str]) -> str:
    """stdout of a command; empty when it is not there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def executable(name: str) -> str | None:
    """Path of a tool on PATH or beside this Python, where ninja is."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def libaio() -> tuple[str | None, bool]:
    """The library's name, and whether its header is there too."""
    places = ["/usr/include", "/usr/local/include", f"{sys.prefix}/include", *os.environ.get("CPATH", "").split(":")]
    return ctypes.util.find_library("aio"), any((Path(place) / "libaio.h").is_file() for place in places)


def ops_directory() -> Path:
    """Where compiled ops are kept."""
    try:
        from sharding.ops import cache_directory  # noqa: PLC0415
    except ImportError:  # a library it needs is missing, which has its own line
        return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache")
    return cache_directory()


def prebuilt(op: str) -> Iterator[Path]:
    """Ops compiled while DeepSpeed was installed (DS_BUILD_…=1)."""
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec("deepspeed")
        if spec and spec.origin:
            yield from (Path(spec.origin).parent / "ops").glob(f"*/{op}_op*.so")


def writable(path: Path) -> bool:
    """`path` can be written to, or made."""
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    return place.is_dir() and os.access(place, os.W_OK)


def memory() -> int:
    """Bytes of memory this process may use: the machine's, or its cgroup's limit; 0 when unknown."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            return min(total, int((Path("/sys/fs/cgroup") / name).read_text()))
    return total
