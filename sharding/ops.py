"""The op DeepSpeed compiles at its first start on a CPU: built once per environment, and said while it happens."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from sharding.errors import UserError
from sharding.world import add_interpreter_to_path


def cache_directory() -> Path:
    """Where compiled ops are kept: TORCH_EXTENSIONS_DIR, else one directory per Python environment.

    torch's default is shared by all environments of a user, which then rebuild over each other.
    """
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    if given:
        return Path(given)
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return home / "dist-train" / "torch_extensions" / hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]


def prepare_ops(say: Callable[[str], None]) -> None:
    """Makes sure DeepSpeed's CPU communication op is compiled, before any rank needs it.

    One process at a time builds, under a lock that dies with its holder; torch's own lock file, which a killed
    build leaves behind and which would then hang
    every later start, is stale whenever that lock is ours.

    Raises:
        UserError: no C++ compiler, no ninja, or the build fails.
    """
    add_interpreter_to_path()
    if choose_accelerator() != "cpu":
        return
    directory = cache_directory()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(directory)
    for tool, package in (
        ("ninja", "pip install ninja"),
        ("c++", "apt-get install g++ (or load your cluster's compiler module)"),
    ):
        if shutil.which(tool) is None:
            raise UserError(
                tool, "is not on PATH, and DeepSpeed compiles its CPU communication op with it", f"Run: {package}"
            )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / "dist-train.lock"):
            build(directory, say)
    except OSError as error:
        raise UserError(
            str(directory), f"cannot be written ({error.strerror})", "Set TORCH_EXTENSIONS_DIR to a writable directory."
        ) from None


def choose_accelerator() -> str:
    """Tells DeepSpeed what to run on, before it is imported; left to itself it prints a warning on every CPU rank."""
    import torch  # noqa: PLC0415

    return os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def build(directory: Path, say: Callable[[str], None]) -> None:
    """Compiles or loads the op while holding the lock."""
    for stale in directory.glob("*/lock"):
        stale.unlink()
    built = any(directory.glob("deepspeed_shm_comm/*.so"))
    if not built:
        say("Compiling DeepSpeed's CPU communication op, once per environment (about half a minute) …")
    from deepspeed.accelerator import get_accelerator  # noqa: PLC0415

    try:
        get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
    except (RuntimeError, ImportError) as error:
        raise UserError(
            "DeepSpeed",
            f"its CPU communication op does not compile ({str(error).splitlines()[0]})",
            f"Check the C++ compiler, delete {directory} and try again; `dist-train doctor` shows what is found.",
        ) from None
