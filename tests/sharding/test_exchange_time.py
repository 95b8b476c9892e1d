from __future__ import annotations

from pathlib import Path

from tests.ranks import run_ranks
from tests.sharding.work_exchange_time import LATE


def test_every_collective_is_timed_and_waiting_told_from_transfer(tmp_path: Path) -> None:
    found = run_ranks("watch", 2, tmp_path, module="tests.sharding.work_exchange_time")
    assert all(found["spans"].values()), found["spans"]
    assert found["off"] == 0 and found["unchanged"]
    *none, (steps, seconds, transfer), after = found["told"]  # on rank 0, which comes first
    assert none == [None, None] and after is None and steps == 3
    assert seconds > 0.8 * LATE and transfer < 0.5 * LATE
    assert found["uneven"] is None
