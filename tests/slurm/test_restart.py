"""What happens after an attempt, judged from records; how they are read; launch settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.errors import UserErrors
from slurm.aftermath import find_failures, logged_step
from slurm.queue import expand
from slurm.record import Attempt, Failure, LaunchRecord
from slurm.restart import decide
from slurm.settings import LaunchSettings, load_settings, minutes

RECIPES = Path(__file__).parents[2] / "recipes"
BOOM = [Failure(rank=3, node="n2", error="RuntimeError: boom at 0x7f12")]


def attempt(outcome: Any, step: int = 5, *, first: int = 0, failures: Any = (), restart: int = 0) -> Attempt:
    return Attempt(
        job="1", restart=restart, started=0.0, nodes=["n1", "n2"], ranks=4, first_step=first, last_step=step,
        outcome=outcome, failures=list(failures),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("history", "action", "reason"),
    [
        ([attempt("finished")], "done", "finished"),
        (
            [attempt("refused", failures=[Failure(error="data.path: gone")])],
            "stop",
            "would fail again: data.path: gone",
        ),
        ([attempt("stopped")], "requeue", "saved at step 5"),
        ([attempt("stopped", 5, first=5)] * 3, "stop", "before they made a step"),
        ([attempt("stopped", 5, first=4)] * 9, "requeue", "saved at step 5"),
        ([attempt("failed", failures=BOOM)], "requeue", "boom"),
        (
            [attempt("failed", failures=BOOM)] * 3,
            "stop",
            "3 attempts ended at step 5 in the same way: RuntimeError: boom",
        ),
        ([attempt("failed", step, failures=BOOM) for step in (5, 6, 7)], "requeue", "boom"),
        ([attempt("failed", step, failures=BOOM) for step in range(22)], "stop", "22 failures"),
        ([attempt("failed", failures=BOOM)] * 2 + [attempt("hung", failures=BOOM)], "requeue", "boom"),
        ([attempt("lost", step) for step in (5, 5, 5)], "stop", "no error was told"),
    ],
)
def test_decisions(history: list[Attempt], action: str, reason: str) -> None:
    found = decide(history, LaunchSettings(), cancelled=False)
    assert found.action == action and reason in found.reason


def test_addresses_and_nodes_do_not_make_an_error_another() -> None:
    history = [
        attempt(
            "failed", failures=[Failure(rank=i, node=f"n{1 + i % 2}", error=f"boom {i} at 0x{i:04x} on n{1 + i % 2}")]
        )
        for i in range(3)
    ]
    assert decide(history, LaunchSettings(), cancelled=False).action == "stop"


def test_cancelled_runs_stay_ended() -> None:
    for outcome in ("stopped", "failed", "hung", "lost"):
        assert decide([attempt(outcome)], LaunchSettings(), cancelled=True).action == "stop"
    assert decide([attempt("finished")], LaunchSettings(), cancelled=True).action == "done"


def test_bad_nodes_are_left_out() -> None:
    """At once if preflight names them; after the second failure in a row that begins there; and from then on."""
    named = attempt("bad nodes", failures=[Failure(node="n7", error="ECC")])
    assert decide([named], LaunchSettings(), cancelled=False).excluded == ["n7"]
    once, twice = [attempt("failed", 5, failures=BOOM)], [attempt("failed", step, failures=BOOM) for step in (5, 9)]
    assert decide(once, LaunchSettings(), cancelled=False).excluded == []
    found = decide(twice, LaunchSettings(), cancelled=False)
    assert (found.action, found.excluded) == ("requeue", ["n2"])
    later = [*twice[:1], twice[1].model_copy(update={"excluded": found.excluded}), attempt("stopped", 20)]
    assert decide(later, LaunchSettings(), cancelled=False).excluded == ["n2"]


@given(
    st.lists(st.sampled_from(["stopped", "failed", "hung", "lost", "bad nodes"]), min_size=1, max_size=60), st.data()
)
def test_a_run_that_fails_for_ever_ends(outcomes: list[str], data: st.DataObject) -> None:
    """Whatever happens, there are never more failures than allowed without a stop."""
    settings = LaunchSettings(max_restarts=5)
    history = [attempt(outcome, data.draw(st.integers(0, 3)), failures=BOOM) for outcome in outcomes]
    failures = sum(outcome != "stopped" for outcome in outcomes)
    if failures > 5 and outcomes[-1] != "stopped":
        assert decide(history, settings, cancelled=False).action == "stop"


def test_the_cause_comes_before_its_consequences(tmp_path: Path) -> None:
    """A rank that was killed, then what ranks say, last those that lost the connection to it."""
    lines = "srun: error: n2: task 3: Killed\nsrun: error: n1: tasks 0-2: Exited with exit code 1\n"
    for rank, what in ((0, "RuntimeError: Connection closed by peer [10.0.0.2]:17"), (1, "ValueError: other")):
        row = [f"rank {rank} on n1", what, "See its log."]
        (tmp_path / f"rank_{rank}.error.json").write_text(json.dumps([row]))
    found = find_failures(tmp_path, lines)
    assert [(failure.rank, failure.node) for failure in found] == [(3, "n2"), (1, "n1"), (0, "n1")]
    assert found[0].error == "Killed"
    assert find_failures(tmp_path / "none", lines.splitlines()[1] + "\n")[0].rank == 0


def test_damaged_files_are_read_as_far_as_they_go(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 7}\n{"kind": "eval", "step": 7}\n{"kind": "st')
    assert logged_step(tmp_path) == 7
    record = LaunchRecord(tmp_path)
    record.add_attempt(attempt(None))
    record.add_attempt(attempt("failed"))
    record.add_attempt(attempt(None, restart=1))
    with record.attempts.open("a") as file:
        file.write('{"job": "1", "rest')
    assert [(found.restart, found.outcome) for found in record.read_attempts()] == [(0, "failed"), (1, None)]


@given(st.lists(st.tuples(st.sampled_from(["gpu", "n", "rack2-"]), st.integers(0, 90), st.integers(0, 9)), min_size=1))
def test_node_lists(groups: list[tuple[str, int, int]]) -> None:
    text, hosts = [], []
    for prefix, first, more in groups:
        text.append(f"{prefix}[{first:03d}-{first + more:03d},200]" if more else f"{prefix}{first:03d}")
        hosts += [f"{prefix}{number:03d}" for number in range(first, first + more + 1)] + (
            [f"{prefix}200"] * (more > 0)
        )
    assert expand(",".join(text)) == hosts


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 90), ("10:30", 10.5), ("1:00:00", 60), ("2-00", 2880), ("1-02:30", 1590), ("soon", None), ("0", None)],
)
def test_time_limits(text: str, expected: float | None) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize("path", sorted((RECIPES / "slurm").glob("*.yaml")), ids=lambda path: path.stem)
def test_launch_files(path: Path) -> None:
    settings = load_settings(path, partition="gpu")
    assert settings.node_counts[1] == int(path.stem.split("_")[0]) and settings.partition == "gpu"


def test_all_mistakes_of_a_launch_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "launch.yaml"
    path.write_text("nodes: 4-2\ngpu_per_node: 8\ntime: [1]\n")
    with pytest.raises(UserErrors) as raised:
        load_settings(path, cpus_per_rank=0)
    told = str(raised.value)
    for key in (f"{path}: nodes", f"{path}: gpu_per_node", f"{path}: time", "--cpus-per-rank"):
        assert key in told
