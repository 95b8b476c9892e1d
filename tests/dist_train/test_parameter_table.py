"""The parameter table of quantised and sharded models, counted against the plain model."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dist_train.parameter_table import parameter_rows
from tests.dist_train.work_adapters import WIDE_TEXT
from tests.ranks import run_ranks

PARTS = {"audio", "llm", "projector", "fusion", "imagination"}


def lora(quantisation: str, stage: int, **zero: Any) -> dict[str, Any]:
    """A tiny recipe's changes."""
    return {
        "text": {**WIDE_TEXT, "tuning": "lora", "quantisation": quantisation},
        "zero": {"stage": stage, "replicate_int8": True, **zero},
        "precision": "bf16",
    }


def test_everything_is_counted_whole_and_said_where_it_lies(tmp_path: Path) -> None:
    cases = [lora("none", 2), lora("int8", 2), lora("nf4", 2), lora("none", 3), lora("int8", 3), lora("nf4", 3),
             lora("none", 3, persistence_threshold=10**6)]  # fmt: skip
    found = run_ranks(
        "parameter_table", 2, tmp_path, module="tests.dist_train.work_adapters", seed=secrets.randbits(31),
        changes=cases,
    )  # fmt: skip
    bytes_per_value = {"bfloat16": 2, "int8": 1, "nf4": 0.5}
    for case, outcome in zip(cases, found, strict=True):
        rows, quantisation = outcome["rows"], case["text"]["quantisation"]
        assert {row["part"] for row in rows} == PARTS
        assert sum(row["count"] for row in rows) == outcome["parameters"]
        trained = {
            part: sum(row["count"] for row in rows if row["part"] == part and row["trainable"]) for part in PARTS
        }
        assert trained["llm"] == outcome["adapters"] > 0 and all(trained.values())
        sharded = case["zero"]["stage"] == 3 and "persistence_threshold" not in case["zero"]
        assert {row["held"] for row in rows} == {"1/2 per rank" if sharded else "whole"}
        assert {row["device"] for row in rows} == {"cpu"}
        kinds = {row["dtype"]: row for row in rows if row["part"] == "llm" and not row["trainable"]}
        assert kinds.keys() == {"bfloat16", quantisation} - {"none"}
        for dtype, row in kinds.items():
            copies = 1.5 if sharded and dtype == "int8" else 0.5 if sharded else 1  # int8: the whole and a shard
            expected = row["count"] * bytes_per_value[dtype] * copies
            assert expected <= row["bytes"] <= 1.1 * expected + 1000, (case, row)
        for row in rows:
            assert f"{row['count']:,}" in outcome["shown"] and row["dtype"] in outcome["shown"]
        assert f"{outcome['parameters']:,}" in outcome["shown"]
    written = json.loads((tmp_path / "parameters.json").read_text())
    assert written["parameters"] == found[-1]["parameters"] and written["rows"] == found[-1]["rows"]
    assert written["trainable"] == sum(row["count"] for row in written["rows"] if row["trainable"])


@pytest.mark.usefixtures("world_of_one")
def test_tied_weights_count_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 4, bias=False), "b": nn.Linear(3, 4, bias=False)})
    model["b"].weight = model["a"].weight
    (row,) = parameter_rows(model)
    assert (row.part, row.count, row.bytes, row.held, row.trainable) == ("a", 12, 48, "whole", True)
