"""Whether every node sees the same shards and can read them."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, Field

from dist_train.batch import DataSettings
from sharding.errors import UserError
from sharding.shards import DatasetInfo, ShardEntry, load_index, load_info, read_sample
from slurm.preflight.findings import Finding, findings_of, severity_of

CHECK = "shards"
TARS = 8  # of which a rank reads a sample
SHOWN = 3  # problems of a rank that are told


class Shards(BaseModel):
    """What one rank found in one directory of shards."""

    file_system: str | None = Field(description="Kind of file system it lies on.")
    content: str | None = Field(None, description="Content hash in dataset.json, and hash of its bytes.")
    read: int = Field(0, description="Samples read.")
    problems: list[str] = []


def look_at_shards(data: DataSettings, seed: int, part: int, parts: int, until: float) -> dict[str, Shards]:
    """Opens the recipe's directories of shards as far as time allows.

    Args:
        seed: the same on all nodes, so that they read the same samples.
        part, parts: which of the ranks of its node this one is; each reads samples of other tars.
        until: when to read no more samples (time.monotonic).
    """
    paths = [data.path] if data.path is not None else [source.path for source in data.sources or ()]
    return {path: look_at(Path(path), seed, part, parts, until) for path in paths}


def look_at(root: Path, seed: int, part: int, parts: int, until: float) -> Shards:
    """One directory, see `look_at_shards`."""
    found = Shards(file_system=file_system_of(root))
    try:
        info = load_info(root)
        names = {entry.name for entry in os.scandir(root)}
        digest = hashlib.sha256((root / "dataset.json").read_bytes()).hexdigest()
    except UserError as error:
        found.problems = [f"{error.where} {error.problem}"]
        return found
    except OSError as error:
        found.problems = [f"{root} cannot be read ({error.strerror or error})"]
        return found
    found.content = f"{info.content_hash[:12]} ({digest[:12]})"
    tars = [(split, entry) for split, held in info.splits.items() for entry in held.shards]
    missing = [entry.file for _, entry in tars if entry.file not in names]
    if missing:
        more = f" (and {len(missing) - 1} more of {len(tars)} tars)" if len(missing) > 1 else ""
        found.problems.append(
            f"{root / missing[0]}{more} are not there" if more else f"{root / missing[0]} is not there"
        )
    draw = random.Random(seed)
    draw.shuffle(tars)
    for split, entry in tars[part::parts][:TARS]:
        if time.monotonic() > until:
            break
        if entry.file not in missing:
            try:
                read_one(root, info, split, entry, random.Random(f"{seed} {entry.file}"))
                found.read += 1
            except UserError as error:
                found.problems.append(f"{error.where} {error.problem}")
    del found.problems[SHOWN:]
    return found


def read_one(root: Path, info: DatasetInfo, split: str, entry: ShardEntry, draw: random.Random) -> None:
    """Reads and checks a random sample of a tar.

    Raises:
        UserError: it, the tar or its index is damaged.
    """
    columns = load_index(root, split, entry).columns
    row = draw.randrange(len(columns.key))
    path = root / entry.file
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(str(path), f"cannot be opened ({error.strerror})", "Check the permissions") from None
    try:
        read_sample(
            descriptor,
            str(path),
            info.dims,
            key=columns.key[row],
            offset=columns.offset[row],
            size=columns.size[row],
            sha256=columns.sha256[row],
        )
    finally:
        os.close(descriptor)


def judge_shards(found: Mapping[int, Mapping[str, Shards]], nodes: Sequence[str]) -> Iterator[Finding]:
    """Names the ranks that miss shards, see others, or cannot read them.

    Args:
        found: of each rank, by directory.
        nodes: name of the node of each rank.
    """
    for path in dict.fromkeys(path for one in found.values() for path in one):
        here = {rank: one[path] for rank, one in found.items() if path in one}
        good = [one for one in here.values() if not one.problems]
        system = good[0].file_system if good else None
        failing = {rank: "; ".join(one.problems) for rank, one in here.items() if one.problems}
        severity = severity_of({nodes[rank] for rank in failing}, nodes, system)
        remedy = "Put the shards where all nodes see them, and check them with `dist-train shards verify`."
        yield from findings_of(nodes, CHECK, failing, remedy, severity)
        contents = [one.content for one in here.values() if one.content is not None]
        usual = max(contents, key=contents.count, default=None)  # of equally many, the first
        other = {
            rank: f"{path} has other content than elsewhere: {one.content}, not {usual}"
            for rank, one in here.items()
            if one.content not in (None, usual)
        }
        severity = severity_of({nodes[rank] for rank in other}, nodes, system)
        yield from findings_of(nodes, CHECK, other, "Give all nodes the same shards.", severity)


def file_system_of(path: Path) -> str | None:
    """Kind of file system on which a place lies or would lie: ext4, nfs4, lustre …; None where nothing tells."""
    try:
        place = str(path.resolve())
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except (OSError, RuntimeError):
        return None
    kinds = {}
    for line in mounts:
        before, _, after = line.partition(" - ")
        kinds[before.split()[4].encode().decode("unicode_escape")] = after.split()[0]  # the last mount counts
    return kinds[max((mount for mount in kinds if is_below(place, mount)), key=len)]


def is_below(place: str, mount: str) -> bool:
    """Whether a path is the mount point or lies under it."""
    return mount in ("/", place) or place.startswith(mount + "/")
