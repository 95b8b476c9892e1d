"""Which checkpoints of a run stay, which one is the newest that is whole, and the pointers to them."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from sharding.errors import UserError, UserErrors
from sharding.portable import WRITING, Portable

LAST = "last"
STEP = re.compile(r"step_(\d{8,})")
ASIDE = ".aside"  # ends the name of what a resumed run was set back behind


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step_{step:08d}"


def completed(root: Path) -> dict[int, Path]:
    """The checkpoints that were completed (they may have been damaged since), by step, newest first."""
    found = {int(match[1]): path for path in root.glob("step_*") if (match := STEP.fullmatch(path.name))}
    return dict(sorted(found.items(), reverse=True))


def point(root: Path, pointers: dict[str, int]) -> None:
    """Makes each pointer (`last`, `best`) name the checkpoint of its step, each in one atomic move."""
    for name, step in pointers.items():
        temporary = root / f"{name}.new"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(step_directory(root, step).name)
        temporary.replace(root / name)


def prune(root: Path, keep_last: int, keep_every: int | None) -> None:
    """Removes all checkpoints but the newest `keep_last`, those of every `keep_every`-th step, and those that pointers
    name.
    """
    pointed = {link.resolve().name for link in root.iterdir() if link.is_symlink()}
    for position, (step, path) in enumerate(completed(root).items()):
        if position < keep_last or path.name in pointed or (keep_every is not None and step % keep_every == 0):
            continue
        leaving = path.with_name(path.name + WRITING)  # renamed first: half of it must not look like a checkpoint
        shutil.rmtree(leaving, ignore_errors=True)
        shutil.rmtree(path.rename(leaving))


@dataclass(frozen=True)
class Newest:
    """What a run continues from.

    Args:
        checkpoint: it.
        pointers: what its run pointed to then, so far as that is whole; without "last".
        lost: pointers whose checkpoint is not whole any more.
        errors: what is wrong with newer ones.
    """

    checkpoint: Portable
    pointers: dict[str, int]
    lost: list[str]
    errors: list[UserError]


def newest_whole(root: Path) -> Newest:
    """The newest checkpoint that is whole, every byte of it compared with its manifest.

    Preferred is the newest one whose pointers are whole, too: from there the run ends as if nothing had been damaged.

    Raises:
        UserErrors: there is none; what is wrong with each.
    """
    wrong: dict[int, UserError] = {}
    whole: dict[int, Portable] = {}
    for step, path in completed(root).items():
        try:
            whole[step] = Portable(path)
        except UserError as error:
            wrong[step] = error
    if not whole:
        raise UserErrors(list(wrong.values()) or [UserError(str(root), "holds no checkpoint", "Start the run anew.")])

    def lost(step: int) -> list[str]:
        return [name for name, to in pointers_of(whole[step]).items() if to not in whole]

    chosen = next((step for step in whole if not lost(step)), next(iter(whole)))
    kept = {name: step for name, step in pointers_of(whole[chosen]).items() if step in whole}
    return Newest(whole[chosen], kept, lost(chosen), [error for step, error in wrong.items() if step > chosen])


def pointers_of(checkpoint: Portable) -> dict[str, int]:
    """What the run pointed to when the checkpoint was written.

    Raises:
        UserError: the state does not tell.
    """
    found = checkpoint.state.get("pointers")
    if not isinstance(found, dict) or not all(isinstance(step, int) for step in found.values()):
        path = checkpoint.directory / "state.json"
        raise UserError(str(path), f"has pointers {found!r}", "Use another checkpoint of the run.")
    return found


def set_back(root: Path, newest: Newest) -> None:
    """Makes the checkpoint the last one: newer ones get the name step_….aside, pointers go back, what was never
    completed is removed.
    """
    directory = newest.checkpoint.directory
    for path in completed(root).values():
        if path.name > directory.name:
            aside = path.with_name(path.name + ASIDE)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    for path in root.glob(f"*{WRITING}"):
        shutil.rmtree(path)
    for name in newest.lost:
        (root / name).unlink(missing_ok=True)
    point(root, {**newest.pointers, LAST: int(directory.name.removeprefix("step_"))})
