"""A grid file: which points a sweep has, and what each changes in the recipe. See docs/sweeps.md."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)
from yaml import YAMLError

from dist_train.recipe_file import read
from sharding.errors import UserError, UserErrors
from slurm.settings import LaunchSettings, node_range

EXAMPLE = "See recipes/sweeps/learning_rate.yaml for a grid file."
MOST_POINTS = 4000  # Slurm's default is 10,000 jobs of all users
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=,+-]{0,99}")
RESERVED = ("sweep.parquet", "sweep.png", "sweep.html")


class ListedPoint(BaseModel):
    """A point written out."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    name: str | None = None
    overrides: list[str] = Field(default_factory=list)
    nodes: Annotated[str, AfterValidator(node_range)] | None = None
    ranks: PositiveInt | None = None
    """Of each node, each with a GPU where the launch has GPUs."""
    published: dict[Literal["complete", "missing"], FiniteFloat] = Field(default_factory=dict)
    """MAE (macro-F1 in classification) of each flow in the literature, shown beside what is found."""


class GridFile(BaseModel):
    """The file's keys. Its points are those of `grid` (all combinations) and those of `points`, each with each seed."""

    model_config = ConfigDict(extra="forbid")

    recipe: Path
    """Relative to the grid file."""
    overrides: list[str] = Field(default_factory=list)
    """Of all points."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    points: list[ListedPoint] = Field(default_factory=list)
    seeds: list[NonNegativeInt] = Field(default_factory=list)


class Point(BaseModel):
    """A run of a sweep.

    Attributes:
        overrides: all of them, in the order in which they are applied.
        values: what this point sets by itself, by key of the recipe, as text.
        setting: the name it was given, which points that differ in their seed alone share.
        published: see `ListedPoint`.
        nodes, ranks: what it asks for; None: what the launch settings say.
    """

    name: str
    overrides: list[str]
    values: dict[str, str]
    nodes: str | None = None
    ranks: int | None = None
    setting: str | None = None
    published: dict[str, float] = Field(default_factory=dict)

    def settings(self, base: LaunchSettings) -> LaunchSettings:
        """How it is launched."""
        update: dict[str, Any] = {} if self.nodes is None else {"nodes": self.nodes}
        if self.ranks is not None:
            update["ranks_per_node"] = self.ranks
            update["gpus_per_node"] = self.ranks if base.gpus_per_node else 0
        return base.model_copy(update=update)


def read_grid(path: Path, overrides: Sequence[str] = ()) -> tuple[Path, list[Point]]:
    """Reads a grid file. Returns the recipe's path, and the points in order.

    Args:
        overrides: of all points, after those of the file.

    Raises:
        UserError: it cannot be read as YAML.
        UserErrors: all else that is wrong with it.
    """
    values = OmegaConf.to_container(read(path, EXAMPLE))
    try:
        grid = GridFile.model_validate(values)
    except ValidationError as error:
        raise UserErrors([told(found, path) for found in error.errors()]) from None
    errors = list(shortcomings(grid, path))
    if errors:
        raise UserErrors(errors)
    points = list(expand(grid, overrides))
    errors = list(misnamed(points, path))
    if errors:
        raise UserErrors(errors)
    return path.parent / grid.recipe, points


def told(found: Any, path: Path) -> UserError:
    """One of pydantic's findings."""
    key = ".".join(map(str, found["loc"]))
    where = f"{path}: {key}"
    if found["type"] == "extra_forbidden":
        known = ListedPoint if found["loc"][0] == "points" else GridFile
        return UserError(where, "is not known here", f"Known: {', '.join(known.model_fields)}.")
    if found["type"] == "missing":
        return UserError(where, "is missing", EXAMPLE)
    return UserError(where, f"is {found['input']!r}: {found['msg'].removeprefix('Value error, ')}", EXAMPLE)


def shortcomings(grid: GridFile, path: Path) -> Iterator[UserError]:
    """What is wrong with the file as a whole."""
    empty = [key for key, values in grid.grid.items() if not values]
    yield from (UserError(f"{path}: grid.{key}", "has no values", "List some, or leave it out.") for key in empty)
    if not (grid.grid or grid.points or grid.seeds):
        yield UserError(str(path), "has no points", "Give it a grid, points or seeds.")
    seeded = [key for key in grid.grid if key == "seed"]
    seeded += [text for point in grid.points for text in point.overrides if key_of(text) == "seed"]
    if grid.seeds and seeded:
        yield UserError(f"{path}: seeds", "multiplies points that set their seed themselves", "Leave one of them out.")
    of_grid = math.prod(len(values) for values in grid.grid.values()) if grid.grid else 0
    count = max(of_grid + len(grid.points), 1) * max(len(grid.seeds), 1)
    if count > MOST_POINTS:
        yield UserError(str(path), f"makes {count} points, at most {MOST_POINTS} are taken", "Make several sweeps.")


def expand(grid: GridFile, overrides: Sequence[str]) -> Iterator[Point]:
    """All points, in order; a seed is the last to be set."""
    listed = [
        *(ListedPoint(overrides=list(combination)) for combination in combinations(grid.grid)),
        *grid.points,
        *([] if grid.grid or grid.points else [ListedPoint()]),
    ]
    short = short_names({key_of(text) for point in listed for text in point.overrides} | set(grid.grid))
    for point in listed:
        for seed in grid.seeds or (None,):
            added = [*point.overrides, *([] if seed is None else [f"seed={seed}"])]
            words = [] if point.name else [f"{short[key_of(text)]}={value_of(text)}" for text in point.overrides]
            words += [] if point.name or point.nodes is None else [f"nodes={point.nodes}"]
            words += [] if point.name or point.ranks is None else [f"ranks={point.ranks}"]
            words += [] if seed is None else [f"seed={seed}"]
            made = re.sub(r"[^A-Za-z0-9_.=,+-]+", "-", ",".join(words)).strip("-.,=+_") or "recipe"
            name = made if point.name is None else ",".join([point.name, *words])
            yield Point(
                name=name,
                overrides=[*grid.overrides, *overrides, *added],
                values={key_of(text): value_of(text) for text in added},
                nodes=point.nodes,
                ranks=point.ranks,
                setting=point.name,
                published=dict(point.published),
            )


def combinations(grid: dict[str, list[Any]]) -> Iterator[tuple[str, ...]]:
    """Overrides of each combination of values, the last key's changing first."""
    if grid:
        yield from itertools.product(*([f"{key}={as_text(value)}" for value in values] for key, values in grid.items()))


def as_text(value: Any) -> str:
    """A value as an override has it."""
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        plain = OmegaConf.to_container(OmegaConf.from_dotlist([f"x={text}"]), resolve=False)
    except (OmegaConfBaseException, YAMLError, ValueError):
        plain = None
    return text if plain == {"x": value} else json.dumps(value)


def key_of(text: str) -> str:
    """The key of an override."""
    return text.partition("=")[0]


def value_of(text: str) -> str:
    """The value of an override."""
    return text.partition("=")[2]


def short_names(keys: set[str]) -> dict[str, str]:
    """The last part of each key, or the whole key where two end alike."""
    ends = Counter(key.rpartition(".")[2] for key in keys)
    return {key: key if ends[end := key.rpartition(".")[2]] > 1 else end for key in keys}


def misnamed(points: Sequence[Point], path: Path) -> Iterator[UserError]:
    """Names that cannot be those of directories."""
    for name, times in Counter(point.name for point in points).items():
        if times > 1:
            yield UserError(f"{path}: {name}", f"is the name of {times} points", "Name or leave out all but one.")
        if NAME.fullmatch(name) is None or name in RESERVED:
            remedy = "Use up to 100 letters, digits and _ . = , + -, the first a letter or digit."
            yield UserError(f"{path}: {name}", "cannot be the name of a run directory", remedy)
