from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_train.speed import read_steps, speed


def row(seconds: float, **more: Any) -> dict[str, Any]:
    phases = {"forward": seconds / 2, "rollout": seconds / 4}
    known = {"clips": 8, "tokens": 100, "data_seconds": 0.1, "phases": phases, "padding_share": 0.2, "micro_steps": 2}
    return {"kind": "step", "step_seconds": seconds, **known, **more}


def test_rates_leave_the_first_steps_out(tmp_path: Path) -> None:
    rows = [row(50.0), row(9.0), row(7.0, measured=True), row(1.0, mfu=0.4, exchange_seconds=0.5), {"kind": "eval"}]
    rows.append(row(3.0, clips=4, padding_share=0.4, mfu=0.2, exchange_seconds=0.1))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(made) + "\n" for made in rows))
    found = speed(read_steps(tmp_path / "metrics.jsonl"))
    assert found["clips_per_second"] == pytest.approx(12 / 4) and found["tokens_per_second"] == pytest.approx(200 / 4)
    assert found["data_share"] == pytest.approx(0.2 / 4) and found["rollout_share"] == pytest.approx(1 / 4)
    assert found["phase_seconds"] == pytest.approx({"forward": 1.0, "rollout": 0.5})
    assert found["exchange_share"] == pytest.approx(0.6 / 4)
    assert found["padding_share"] == pytest.approx(0.3) and found["micro_steps"] == 2
    assert found["step_seconds"] == 2 and found["mfu"] == pytest.approx((0.4 * 1 + 0.2 * 3) / 4)


def test_a_run_of_one_step_and_of_none() -> None:
    assert speed([row(2.0)])["clips_per_second"] == 4 and speed([]) == {}
    assert speed([row(2.0)])["mfu"] is None and speed([row(2.0)])["exchange_share"] is None
