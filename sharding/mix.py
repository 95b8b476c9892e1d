"""Several datasets as one, mixed by weight."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from sharding.errors import UserError, UserErrors
from sharding.shards import SOURCE, SPLITS, Dims, Features, load_info
from sharding.shuffle import Source, shares
from sharding.stream import ShardedSplit
from sharding.table import LENGTHS, PLACES, Keys, Lengths, Table, open_table

Found = TypeVar("Found")


class Part(NamedTuple):
    """One dataset of a mix.

    Args:
        name: stands before its keys, NAME/KEY; without "/".
        root: directory of shards.
        weight: its part of a training epoch, relative to those of the others.
    """

    name: str
    root: Path
    weight: float


@dataclass(frozen=True)
class MixInfo:
    """What the datasets of a mix have in common.

    Args:
        splits: samples by split, of all datasets together.
        dims: widths.
        label_range: smallest and largest label.
        features: of what its features were made, but for the clips; see `shards.DatasetInfo`.
        classes: names of classes, where labels are such.
        content_hash: sha256 of the sorted lines "name TAB weight TAB content hash NEWLINE".
    """

    splits: dict[str, int]
    dims: Dims
    label_range: tuple[float, float]
    content_hash: str
    features: Features | None = None
    classes: list[str] | None = None


class MixedSplit(ShardedSplit):
    """One split of several datasets: all samples of each, ordered by dataset name, then key.

    Keys are NAME/KEY, so datasets may have keys in common. The order of `parts` has no meaning. A training epoch draws
    from the datasets by weight (`sources`, see `shuffle.epoch_order`); visited without shuffling, each sample comes
    once, unweighted. A dataset without this split contributes nothing to it.

    Args:
        parts: at least one, their names all different.
        split: train, valid or test.
        on_bad_sample: see ShardedSplit.

    Raises:
        UserError, UserErrors: every dataset that cannot be opened or does not fit the others; no dataset has the split.
    """

    def __init__(self, parts: Sequence[Part], split: str, on_bad_sample: Literal["stop", "set_aside"] = "stop") -> None:
        parts = sorted(parts)
        self.split, self.on_bad_sample = split, on_bad_sample
        self.info = mix_info(parts)
        roots = ", ".join(str(part.root) for part in parts)
        having = [part for part in parts if split in load_info(part.root).splits]
        if not having:
            remedy = (
                f"Use {' or '.join(self.info.splits)}, or put clips of that split into a manifest and make its shards"
            )
            raise UserError(roots, f"have no split {split!r}", remedy)
        tables = each(having, lambda part: open_table(part.root, split)[1])
        self._prefixes = [len(part.name) + 1 for part in having]
        self._firsts = np.cumsum([0, *map(len, tables)])
        sources = tuple(Source(len(table), part.weight, part.name) for part, table in zip(having, tables, strict=True))
        try:
            shares(sources)
        except ValueError as error:
            remedy = "Raise the smallest weight, or leave its dataset out"
            raise UserError(roots, f"cannot be mixed so: {error}", remedy) from None
        self.take(joined([part.name for part in having], tables), self.info.dims, sources)

    def name_in_tar(self, index: int) -> str:
        """The key as the tar's members have it."""
        part = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self.keys[index][self._prefixes[part] :]


def mix_info(parts: Sequence[Part]) -> MixInfo:
    """What the datasets have in common, of their dataset.json.

    Raises:
        UserError, UserErrors: every dataset that cannot be opened, or does not fit the first.
    """
    infos = each(parts, lambda part: load_info(part.root))
    widths: dict[str, Any] = {}
    errors = list[UserError]()
    for name in Dims.model_fields:
        found: dict[Any, Part] = {getattr(info.dims, name): part for part, info in zip(parts, infos, strict=True)}
        found.pop(None, None)  # a dataset may lack a modality
        widths[name] = next(iter(found), None)
        for width in list(found)[1:]:
            problem = f"has {name} of width {width}, {found[widths[name]].root} of width {widths[name]}"
            errors.append(UserError(str(found[width].root), problem, "Make them alike, or leave one of them out"))
    for part, info in zip(parts, infos, strict=True):
        if info.classes != infos[0].classes:
            shown = [", ".join(one.classes) if one.classes else "none" for one in (info, infos[0])]
            problem = f"has classes {shown[0]}, {parts[0].root} has {shown[1]}"
            errors.append(UserError(str(part.root), problem, "Make its shards anew with the other --classes"))
        elif info.label_range != infos[0].label_range:
            bounds = ["{:g} … {:g}".format(*one.label_range) for one in (info, infos[0])]
            problem = f"has labels in {bounds[0]}, {parts[0].root} in {bounds[1]}"
            errors.append(UserError(str(part.root), problem, "Make its shards anew with the other --label-range"))
    features = [None if info.features is None else {**info.features, SOURCE: None} for info in infos]
    for part, found_features in zip(parts, features, strict=True):
        if found_features != features[0]:
            problem = f"has features that were made in another way than those of {parts[0].root}"
            errors.append(UserError(str(part.root), problem, "Extract both alike, or leave one of them out"))
    raise_all(errors)
    lines = sorted(
        f"{part.name}\t{part.weight!r}\t{info.content_hash}\n" for part, info in zip(parts, infos, strict=True)
    )
    splits: dict[str, int] = {}
    for name in SPLITS:
        counts = [info.splits[name].samples for info in infos if name in info.splits]
        if counts:
            splits[name] = sum(counts)
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    return MixInfo(splits, Dims(**widths), infos[0].label_range, digest, features[0], infos[0].classes)


def joined(names: Sequence[str], tables: Sequence[Table]) -> Table:
    """One table of several, their keys as NAME/KEY."""
    first = np.cumsum([0, *(len(table.tars) for table in tables)])
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(table, name) for table in tables]) for name in PLACES if name != "tar"
    }
    columns |= {
        name: Lengths(np.concatenate([getattr(table, name).values for table in tables]), whole=name != "audio_seconds")
        for name in LENGTHS
    }
    return Table(
        tars=[tar for table in tables for tar in table.tars],
        tar=np.concatenate([table.tar + start for table, start in zip(tables, first, strict=False)]).astype(np.int32),
        key=Keys.of([f"{name}/{key}" for name, table in zip(names, tables, strict=True) for key in table.key]),
        **columns,
    )


def each(parts: Sequence[Part], found: Callable[[Part], Found]) -> list[Found]:
    """`found` of every part.

    Raises:
        UserError, UserErrors: of all parts together.
    """
    results, errors = [], list[UserError]()
    for part in parts:
        try:
            results.append(found(part))
        except UserError as error:
            errors.append(error)
        except UserErrors as several:
            errors += several.errors
    raise_all(errors)
    return results


def raise_all(errors: list[UserError]) -> None:
    """Raises what was found, if anything was."""
    if errors:
        raise errors[0] if len(errors) == 1 else UserErrors(errors)
