"""`dist-train convert`: read, plan, write beside, read again, rename."""

from __future__ import annotations

import math
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from torch import Tensor

from sharding.errors import UserError
from sharding.portable import flush
from tools.convert.formats import Format, by_name, detect, function
from tools.convert.held import Tensors
from tools.convert.provenance import FILE as PROVENANCE
from tools.convert.provenance import write_provenance
from tools.convert.source import Context, Outgoing, Run, Source

WRITING = ".writing"  # ends the name of a result that is not complete
SLACK = 1 << 20  # bytes beside the tensors: configuration, tokenizer
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def convert(
    src: Path,
    dst: Path,
    to: str,
    *,
    run: Path | None = None,
    base: Path | None = None,
    dtype: str | None = None,
    dry_run: bool = False,
) -> None:
    """Converts a checkpoint; see docs/conversion.md.

    Args:
        src: file or folder; its format is found out.
        dst: folder to make.
        to: name of a format.
        run: run directory that tells what the source does not. Default: the one that src is, or lies in.
        base: folder of the frozen model, in place of the one that recipe or adapter name.
        dtype: fp32 or bf16; None: what the format writes by default.
        dry_run: tell what would be written, and write nothing.

    Raises:
        UserError: what is wrong; nothing is left of the result then.
    """
    console = Console()
    transformers.utils.logging.disable_progress_bar()
    target = by_name(to)
    if dtype is not None and dtype not in DTYPES:
        raise UserError("--dtype", f"is {dtype!r}", "Write fp32 or bf16.")
    check_place(dst)
    found = detect(src)
    console.print(f"{src} is {found.what} ({found.name}).", soft_wrap=True, highlight=False)
    context = Context(find_run(src, run), base, DTYPES[dtype] if dtype else None)
    assert found.read is not None and target.plan is not None
    source: Source = function(found.read)(src, context)
    planned: Outgoing = function(target.plan)(source, context)
    console.print(plan_table(planned, dst, target))
    for line in planned.left_out:
        console.print(f"Left out: {line}.", soft_wrap=True, highlight=False)
    told = len(planned.notes)
    for line in planned.notes:
        console.print(f"Note: {line}.", soft_wrap=True, highlight=False)
    if dry_run:
        console.print("Dry run: nothing is written.")
        return
    check_space(dst, planned.tensors)
    place = dst.with_name(dst.name + WRITING)
    try:
        shutil.rmtree(place, ignore_errors=True)  # left by a conversion that was killed
        place.mkdir(parents=True)
        with Bytes(console, size_of(planned.tensors)) as progress:
            write(planned, place, progress)
        write_provenance(place, src, found, target, source, planned, context)
        flush(place)
        place.rename(dst)
        flush(dst.parent)
    except OSError as error:
        raise UserError(
            str(dst),
            f"cannot be written ({error.strerror or error})",
            "Free space or name another place; nothing is left.",
        ) from None
    finally:
        shutil.rmtree(place, ignore_errors=True)
    for line in planned.notes[told:]:
        console.print(f"Note: {line}.", soft_wrap=True, highlight=False)
    console.print(
        f"Wrote {dst} and read it again with {planned.library}: {len(planned.tensors.shapes)} tensors alike.",
        soft_wrap=True,
        highlight=False,
    )


def check_place(dst: Path) -> None:
    """Refuses a destination before anything costly starts.

    Raises:
        UserError: it exists, or its folder cannot be written to.
    """
    if dst.exists() or dst.is_symlink():
        raise UserError(str(dst), "exists already", "Give a folder that is not there.")
    parent = next(folder for folder in dst.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(str(dst), f"cannot be made ({parent} is not yours to write)", "Name another place.")


def check_space(dst: Path, tensors: Tensors) -> None:
    """Refuses a disk that is too small.

    Raises:
        UserError: it is.
    """
    parent = next(folder for folder in dst.absolute().parents if folder.exists())
    free, needed = shutil.disk_usage(parent).free, size_of(tensors) + SLACK
    if free < needed:
        raise UserError(
            str(dst), f"needs {needed} bytes, {parent} has {free} left", "Free space or name another place."
        )


def find_run(src: Path, named: Path | None) -> Run | None:
    """The run of `--run`, or the one that the source is or lies in (RUN/checkpoints/step_XXXXXXXX).

    Raises:
        UserError: `--run` is no run directory.
    """
    if named is not None:
        return Run(named)
    for folder in (src, *src.resolve().parents[:2]):
        if (folder / "recipe.yaml").is_file():
            return Run(folder)
    return None


def size_of(tensors: Tensors) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(shape) * tensors.dtypes[name].itemsize for name, shape in tensors.shapes.items())


def plan_table(planned: Outgoing, dst: Path, target: Format) -> Table:
    """What is written: tensors and bytes by kind of number, and files."""
    table = Table("what", "tensors", "bytes", title=f"{dst}: {target.name}", title_justify="left")
    tensors = planned.tensors
    for kind in sorted(set(tensors.dtypes.values()), key=str):
        names = [name for name, other in tensors.dtypes.items() if other == kind]
        size = sum(math.prod(tensors.shapes[name]) for name in names) * kind.itemsize
        table.add_row(str(kind).removeprefix("torch."), str(len(names)), f"{size:,}")
    table.add_row("all", str(len(tensors.shapes)), f"{size_of(tensors):,}")
    table.add_row(f"also {', '.join([*planned.files, PROVENANCE])}", "", "")
    return table


def write(planned: Outgoing, place: Path, progress: Bytes) -> None:
    """Writes the result, reads it again and compares both, tensor by tensor.

    Raises:
        UserError: they differ.
        OSError: the disk refuses it.
    """
    sums: dict[str, str] = {}

    def read(name: str) -> Tensor:
        value = planned.tensors.read(name)
        sums[name] = checksum(value)
        progress.advance("writing", value.nbytes)
        return value

    planned.save(place, Tensors(planned.tensors.shapes, planned.tensors.dtypes, read))
    for name, value in watched(planned.reopen(place), progress):
        if sums.pop(name, None) != checksum(value):
            raise differs(place, name)
    if sums:
        raise differs(place, min(sums))


def differs(place: Path, name: str) -> UserError:
    """The error for a result that is not what was written."""
    return UserError(
        str(place).removesuffix(WRITING),
        f"reads {name} differently than it was written",
        "The result was removed; try again.",
    )


def watched(tensors: Iterable[tuple[str, Tensor]], progress: Bytes) -> Iterator[tuple[str, Tensor]]:
    """The same, counted."""
    for name, value in tensors:
        yield name, value
        progress.advance("reading again", value.nbytes)


def checksum(value: Tensor) -> str:
    """Of a tensor's shape, kind and bytes."""
    data = value.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
    return f"{tuple(value.shape)} {value.dtype} {zlib.crc32(data.data)}"


class Bytes:
    """Two progress bars by bytes: writing, and reading again."""

    def __init__(self, console: Console, total: int) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.tasks = {name: self.bar.add_task(name, total=total) for name in ("writing", "reading again")}

    def __enter__(self) -> Bytes:
        self.bar.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self.bar.stop()

    def advance(self, task: str, count: int) -> None:
        """So many bytes more."""
        self.bar.advance(self.tasks[task], count)
