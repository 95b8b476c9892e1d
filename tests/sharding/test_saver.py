"""Saving by all ranks together: any world size reads it, training goes on meanwhile, a failure leaves the last one."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.saver import spread
from tests.ranks import run_ranks


@given(sizes=st.dictionaries(st.text(max_size=3), st.integers(0, 1000)), ranks=st.integers(1, 9))
def test_tensors_are_spread_evenly(sizes: dict[str, int], ranks: int) -> None:
    owners = spread(sizes, dict.fromkeys(sizes, range(ranks)))
    assert owners.keys() == sizes.keys() and set(owners.values()) <= set(range(ranks))
    loads = [sum(sizes[name] for name in sizes if owners[name] == rank) for rank in range(ranks)]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


def test_a_save_behind_the_training(tmp_path: Path) -> None:
    found = run_ranks("behind", 2, tmp_path, module="tests.sharding.work_saver", seed=secrets.randbits(31))
    assert found["continued"] == found["undisturbed"]
    assert "step_00000003: cannot be written" in found["told"] and "--resume" in found["told"]
    assert found["left"] == ["best", "last", "step_00000001", "step_00000002"]
    assert found["pointers"] == {"best": 1}
    files = [f"{kind}-0000{part}-of-00002.safetensors" for kind in ("model", "optimizer") for part in (1, 2)]
    assert found["parts"] == ["manifest.json", *files, "state.json"]


@pytest.mark.slow
def test_a_checkpoint_continues_at_any_world_size_stage_and_adam(tmp_path: Path) -> None:
    """To the last bit where ranks and stage are the same; else up to the order of sums in fp32. From 8 bits, or to
    them, the moments are rounded once.
    """
    seed = secrets.randbits(31)
    cases = [[0, "adamw"], [2, "adamw"], [3, "adamw"], [2, "adamw_8bit"]]
    names = {world: [f"{world} {stage} {name}" for stage, name in cases] for world in (1, 2, 4)}
    found: dict[str, list[float]] = {}
    for world, reads in ((1, []), (4, names[1]), (2, [*names[1], *names[4]]), (1, [*names[2], *names[4]])):
        found |= run_ranks(
            "elastic", world, tmp_path, module="tests.sharding.work_saver", seed=seed, writes=cases, reads=reads
        )
    pairs = {name: losses for name, losses in found.items() if "->" in name}
    assert len(pairs) == 4 * 4 * (1 + 2 + 2)
    for name, losses in pairs.items():
        before, after = name.split(" -> ")
        rounded = "8bit" in before or "8bit" in after
        assert losses == pytest.approx(found[before], rel=0.02 if rounded else 1e-5), name
