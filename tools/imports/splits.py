"""Which clips train, validate and test: names that corpora give their splits, and files that list them."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from sharding.errors import UserError, UserErrors
from sharding.files import read_bounded
from sharding.shards import Split
from tools.imports.tables import read_table

NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "dev", "validation", "develop"),
    "test": ("test", "test1", "testing"),
}
COLUMNS = ("name", "id", "key", "video")  # of a CSV, the first that is there
MOST_BYTES = 1 << 26
REMEDY = 'Give JSON {"train": [names], "valid": […], "test": […]}, a CSV with columns name and split, or the fold file'


def our_split(name: str) -> Split | None:
    """The split that a name commonly stands for."""
    return next((split for split, names in NAMES.items() if name.strip().lower() in names), None)


def match_splits(found: Iterable[str], chosen: dict[Split, str] | None, where: str) -> dict[str, Split]:
    """Our split for names that a source gives its own; names without one are absent.

    Args:
        found: names in the source.
        chosen: what --splits says.
        where: the source, for messages.

    Raises:
        UserError: --splits names what is not there, nothing fits, or two names would be one split.
    """
    found = list(found)
    if chosen is not None:
        unknown = sorted(set(chosen.values()) - set(found))
        if unknown:
            raise UserError("--splits", f"{where} has no {', '.join(unknown)}", f"It has: {', '.join(found) or 'none'}")
        return {name: split for split, name in chosen.items()}
    matched = {name: split for name in found if (split := our_split(name)) is not None}
    for split in get_args(Split):
        several = [name for name, one in matched.items() if one == split]
        if len(several) > 1:
            remedy = f"Say which: --splits {split}={several[0]},…"
            raise UserError(where, f"has {' and '.join(several)}, which both could be {split}", remedy)
    if not matched:
        remedy = "Say which is which: --splits train=NAME,valid=NAME,test=NAME"
        raise UserError(where, f"has no train, valid or test split ({', '.join(found) or 'none at all'})", remedy)
    return matched


def read_split_file(path: Path) -> dict[str, Split]:
    """Split by name of a clip, or of a video for all its clips.

    Args:
        path: JSON {split: [names]}; CSV with columns name (or id, key, video) and split; or Python that assigns lists
            of names to variables such as standard_train_fold (CMU-MultimodalSDK), of which only literals are read.

    Raises:
        UserError, UserErrors: unreadable, of no such kind, or a name in two splits.
    """
    suffix = path.suffix.lower()
    try:
        lists = list(_csv(path) if suffix == ".csv" else _python(path) if suffix == ".py" else _json(path))
    except OSError as error:
        raise UserError(str(path), f"cannot be read ({error.strerror})", REMEDY) from None
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(str(path), f"is no list of splits ({error})", REMEDY) from None
    splits: dict[str, Split] = {}
    errors = []
    for split, names in lists:
        for name in names:
            if not isinstance(name, str):
                errors.append(UserError(str(path), f"{split} holds {name!r}, which is no name", REMEDY))
            elif splits.setdefault(name, split) != split:
                errors.append(UserError(str(path), f"{name!r} is in {splits[name]} and in {split}", "Keep one"))
    if errors:
        raise UserErrors(errors[:50])
    if not splits:
        raise UserError(str(path), "lists no clips by split", REMEDY)
    return splits


def _json(path: Path) -> Iterable[tuple[Split, list[Any]]]:
    held = json.loads(read_bounded(path, MOST_BYTES, REMEDY))
    if not isinstance(held, dict) or not all(isinstance(names, list) for names in held.values()):
        raise ValueError("no object of lists")
    return [(_known(name), names) for name, names in held.items()]


def _csv(path: Path) -> Iterable[tuple[Split, list[Any]]]:
    rows = read_table(path, ("split", COLUMNS))
    column = next((name for name in COLUMNS if rows and name in rows[0]), COLUMNS[0])
    return [(_known(row["split"]), [row[column].strip()]) for row in rows]


def _python(path: Path) -> Iterable[tuple[Split, list[Any]]]:
    tree = ast.parse(read_bounded(path, MOST_BYTES, REMEDY))
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            words = node.targets[0].id.lower().split("_")
            split = next((found for word in words if (found := our_split(word)) is not None), None)
            if split is not None:
                yield split, list(ast.literal_eval(node.value))


def _known(name: str) -> Split:
    split = our_split(name)
    if split is None:
        raise ValueError(f"unknown split {name!r}")
    return split
