"""Runs a function in several real processes that form one world."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sharding import world
from sharding.launch import run_local
from sharding.ops import prepare_ops


def run_ranks(
    function: str,
    ranks: int,
    folder: Path,
    *,
    module: str = "tests.work",
    deepspeed: bool = True,
    prefix: Sequence[str] = (),
    **arguments: Any,
) -> Any:
    """Calls <module>.<function>(folder, **arguments) in `ranks` processes; returns what rank 0 returned (as JSON).

    Args:
        deepspeed: join its world, too; importing it takes seconds.
        prefix: a command that runs the command behind it, such as env.
    """
    result = folder / f"{function}.json"
    command = [*prefix, sys.executable, "-m", "tests.ranks", module, function, str(folder)]
    command += [json.dumps(arguments), "deepspeed" if deepspeed else "torch"]
    code = run_local(command, ranks, folder / "logs")
    logs = "".join(path.read_text()[-2000:] for path in (folder / "logs").glob("*.log"))
    assert code == 0 and result.is_file(), f"{function} failed with {code}\n{logs}"
    return json.loads(result.read_text())


def main(module: str, function: str, folder: Path, arguments: dict[str, Any], deepspeed: bool) -> None:
    """One rank."""
    faulthandler.dump_traceback_later(600, exit=True)
    if deepspeed:
        prepare_ops(lambda text: None)
    joined = world.read_world(os.environ)
    assert joined is not None
    world.join(joined, with_deepspeed=deepspeed)
    value = getattr(importlib.import_module(module), function)(folder, **arguments)
    if joined.rank == 0:
        (folder / f"{function}.json").write_text(json.dumps(value))
    world.leave()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]), sys.argv[5] == "deepspeed")
