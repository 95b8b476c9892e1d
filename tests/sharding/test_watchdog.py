"""Which rank is named, of what all ranks have told. Real hangs are in tests/end_to_end/test_hangs.py."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sharding.watchdog import Place, judge

SECONDS = 10.0
LOGS = Path("logs")
PLACES = st.builds(
    Place,
    count=st.integers(0, 3),
    phase=st.sampled_from(["data", "backward", "exchange"]),
    step=st.integers(5, 6),
    waits=st.booleans(),
    idle=st.floats(0, 20),
)


def named(places: list[Place], silences: list[float]) -> str | None:
    """The rank or ranks, and what is said of them."""
    found = judge(places, silences, SECONDS, LOGS)
    return None if found is None else f"{found.where} {' '.join(found.problem.split()[:2])}"


def test_who_waits_for_others_is_not_named() -> None:
    stuck = Place(step=6, count=2, phase="data", idle=10.5)
    waiting = Place(step=6, count=2, phase="exchange", waits=True, idle=10.2)
    assert named([waiting, stuck], [0.5, 0.5]) == "rank 1 stands still"
    assert named([stuck, waiting], [0.5, 0.5]) == "rank 0 stands still"


def test_who_is_behind_is_named() -> None:
    ahead = Place(step=6, count=3, phase="loss", idle=11)
    behind = Place(step=6, count=2, phase="forward", idle=3)
    assert named([ahead, behind], [0.5, 0.5]) == "rank 1 stands still"


def test_a_stopped_rank_that_said_it_waits_is_named() -> None:
    """Its last word is as old as its silence; the other stands in an exchange its frames do not show."""
    stopped = Place(step=6, count=2, phase="backward", waits=True, idle=0.2)
    held_up = Place(step=6, count=2, phase="backward", waits=False, idle=10.2)
    assert named([held_up, stopped], [0.0, 9.8]) == "rank 1 has not"


@given(st.lists(PLACES, min_size=1, max_size=4), st.data())
def test_a_rank_is_named_only_of_what_it_told(places: list[Place], data: st.DataObject) -> None:
    """Someone is named just if one is idle or silent for too long; a silent one before one that still tells."""
    silences = data.draw(st.lists(st.floats(0, 20), min_size=len(places), max_size=len(places)))
    found = judge(places, silences, SECONDS, LOGS)
    over = any(since > SECONDS for since in silences) or any(place.idle > SECONDS for place in places)
    assert (found is not None) == over
    if found is not None and any(since > SECONDS / 2 for since in silences):
        ranks = [int(word.strip(",")) for word in found.where.split()[1:]]
        assert "has not been heard of" in found.problem and all(silences[rank] > SECONDS / 2 for rank in ranks)
