"""What a sweep has found, in one table: DIR/sweep.parquet, a row a point; DIR/sweep.png and DIR/sweep.html show it."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from dist_train.names import FLOWS
from dist_train.resume import flat
from dist_train.run_record import number
from dist_train.sweep_page import write_page
from dist_train.task import MEASURES, task_of
from sharding.errors import UserError
from slurm.progress import Loader
from slurm.sweep_record import SweepRecord
from slurm.sweep_status import Seen

TEXT, WHOLE, NUMBER = pa.string(), pa.int64(), pa.float64()
SCORES = [
    f"{split}.{part}.{metric}"
    for split in ("test", "valid")
    for part in ("complete", "missing", "gap", "floor")
    for measure in MEASURES.values()
    for metric in measure.names
]
SPEED = ("clips_per_second", "step_seconds", "tokens_per_second", "mfu", "data_share", "padding_share")
FIXED = {
    **dict.fromkeys(("point", "setting", "overrides"), TEXT),
    "seed": WHOLE,
    "state": TEXT,
    "reason": TEXT,
    **dict.fromkeys(("steps", "epochs", "samples", "best_step"), WHOLE),
    **dict.fromkeys(SCORES, NUMBER),
    "test.transcription.nats_per_token": NUMBER,
    "valid.transcription.nats_per_token": NUMBER,
    **dict.fromkeys((f"published.{flow}.{measure.main}" for measure in MEASURES.values() for flow in FLOWS), NUMBER),
    **dict.fromkeys(SPEED, NUMBER),
    "seconds": NUMBER,
    **dict.fromkeys(("world_size", "zero_stage", "restarts"), WHOLE),
    **dict.fromkeys(("nodes", "job", "selected_on", "run"), TEXT),
}
"""Columns of every sweep. Beside them each key of the recipe that points set has one, named as the key."""


def write_results(record: SweepRecord, seen: Sequence[Seen]) -> list[Path]:
    """Writes table, figure and page of what is known by now. Returns their paths.

    Raises:
        UserError: they cannot be written.
    """
    keys = list(dict.fromkeys(key for one in seen for key in one.point.values if key not in FIXED))
    rows = [row_of(record, one, keys) for one in seen]
    path = record.directory / "sweep.parquet"
    try:
        temporary = path.with_name(path.name + ".new")
        pq.write_table(as_table(rows, keys), temporary)
        temporary.replace(path)
        shown = [key for key in (*keys, "seed") if len({repr(row[key]) for row in rows}) > 1]
        return [path, *write_page(record.directory, rows, shown)]
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise UserError(str(path), problem, "Free space or permissions; then dist-train sweep --status.") from None


def row_of(record: SweepRecord, one: Seen, keys: Sequence[str]) -> dict[str, Any]:
    """A point, by column."""
    summary, status = one.summary, one.status
    row: dict[str, Any] = dict.fromkeys((*keys, *FIXED))
    resolved = read_recipe(record.run(one.point).recipe)
    recipe, main = flat(resolved), MEASURES[task_of(resolved).kind].main
    row |= {key: plain_value(recipe.get(key)) for key in keys}
    scores = flat({split: summary[split] for split in ("test", "valid") if isinstance(summary.get(split), dict)})
    speed = summary.get("speed") or {}
    measured = {**scores, **{name: speed.get(name) for name in SPEED}, **summary}
    row |= {name: typed(measured[name], kind) for name, kind in FIXED.items() if name in measured}
    row |= {
        "point": one.point.name,
        "setting": one.point.setting,
        **{f"published.{flow}.{main}": value for flow, value in one.point.published.items()},
        "overrides": shlex.join(one.point.overrides),
        "seed": typed(recipe.get("seed"), WHOLE),
        "state": one.state,
        "reason": one.why or None,
        "run": str(record.directory / one.point.name),
    }
    if status is not None:
        last = status.attempts[-1] if status.attempts else None
        row["steps"] = row["steps"] if summary else status.progress.step
        row["clips_per_second"] = row["clips_per_second"] if summary else status.progress.clips_per_second
        row["world_size"] = row["world_size"] or (last.ranks if last and last.ranks else None)
        row["restarts"] = one.restarts
        row["nodes"] = " ".join(last.nodes) if last else None
        row["job"] = status.job
    return row


def read_recipe(path: Path) -> dict[str, Any]:
    """A resolved recipe as plain values; empty if it is not there or damaged."""
    try:
        found = yaml.load(path.read_text(), Loader=Loader)  # a safe loader
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def plain_value(value: Any) -> Any:
    """A value of a recipe as one cell."""
    return value if value is None or isinstance(value, str | bool | int | float) else json.dumps(value)


def typed(value: Any, kind: pa.DataType) -> Any:
    """A value out of a file as one of a column; None if it is none."""
    if kind == TEXT:
        return None if value is None else str(value)
    found = number(value)
    if math.isnan(found) or (kind == WHOLE and (isinstance(value, bool) or found != int(found))):
        return None
    return int(found) if kind == WHOLE else found


def as_table(rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> pa.Table:
    """The rows with their columns in order. A key of the recipe is a number where it is one at every point."""
    kinds = {name: column_kind([row[name] for row in rows]) for name in keys}
    columns = {"point": TEXT, **kinds, **FIXED}
    arrays = []
    for name, kind in columns.items():
        values = [row[name] for row in rows]
        if name in kinds and kind == TEXT:
            values = [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
        arrays.append(pa.array(values, kind))
    return pa.table(arrays, schema=pa.schema(list(columns.items())))


def column_kind(values: Sequence[Any]) -> pa.DataType:
    """The narrowest type that holds all values."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {bool} and kinds:
        return pa.bool_()
    if kinds <= {int} and kinds:
        return WHOLE
    return NUMBER if kinds <= {int, float} and kinds else TEXT
