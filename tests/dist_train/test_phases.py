from __future__ import annotations

import time

import pytest

from dist_train.phases import Phases, measured, phase


def test_an_inner_phase_counts_once_and_names_add_up() -> None:
    phases = Phases()
    before = time.perf_counter()
    with measured(phases):
        with phase("forward"):
            time.sleep(0.02)
            for _ in range(2):
                with phase("rollout"):
                    time.sleep(0.03)
        with phase("backward"):
            time.sleep(0.01)
        with phase("forward"):
            pass
    whole = time.perf_counter() - before
    seconds = phases.read()
    assert seconds.keys() == {"forward", "rollout", "backward"}
    assert seconds["rollout"] >= 0.06 and seconds["forward"] >= 0.02 and seconds["backward"] >= 0.01
    assert sum(seconds.values()) == pytest.approx(whole, abs=0.01)
    assert phases.read() == {}


def test_an_error_closes_its_phases_and_nothing_is_measured_outside() -> None:
    phases = Phases()
    with pytest.raises(KeyError), measured(phases), phase("forward"), phase("rollout"):
        raise KeyError
    with phase("backward"):
        pass
    assert phases.read().keys() == {"forward", "rollout"}
