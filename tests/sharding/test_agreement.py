"""The checks that ranks agree, and that our model gives them no reason to speak."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, WavLMConfig, WavLMModel

from sharding.agreement import Agreement, first_difference, spell
from tests import tiny
from tests.ranks import run_ranks

NAMES = st.lists(st.sampled_from("abc"), max_size=6)


@given(st.lists(NAMES, min_size=2, max_size=5).filter(lambda every: any(own != every[0] for own in every)))
def test_the_first_difference_is_found(every: list[list[str]]) -> None:
    place, found = first_difference(every)
    assert all(own[:place] == every[0][:place] for own in every)
    there = [own[place] if place < len(own) else None for own in every]
    assert len(found) > 1 and found == {name: [r for r, own in enumerate(there) if own == name] for name in there}


@given(st.sets(st.integers(0, 40), min_size=1))
def test_ranks_are_spelled_shortly(ranks: set[int]) -> None:
    word, spans = spell(sorted(ranks)).split(" ", 1)
    assert word == ("ranks" if len(ranks) > 1 else "rank")
    ends = [[int(end) for end in span.split("-")] for span in spans.split(", ")]
    assert [rank for end in ends for rank in range(end[0], end[-1] + 1)] == sorted(ranks)
    assert all(right[0] > left[-1] + 1 for left, right in pairwise(ends))


def test_nothing_is_hooked_or_exchanged_after_the_first_steps() -> None:
    """There is no process group here to exchange anything in."""
    layer = nn.Linear(1, 1)
    agreement = Agreement(layer, until=3)
    for step in (3, 4):
        with agreement.forward(step), agreement.backward(step):
            assert not layer._forward_pre_hooks and not layer.weight._post_accumulate_grad_hooks
    with pytest.raises(ValueError, match="process group"), agreement.forward(2):
        assert len(layer._forward_pre_hooks) == 1
    assert not layer._forward_pre_hooks


def test_every_rank_is_told_what_differs_where(tmp_path: Path) -> None:
    told: dict[str, Sequence[str | None]] = run_ranks(
        "small_differences", 3, tmp_path, module="tests.sharding.work_agreement"
    )
    expected = {
        "same": None,
        "decoding": None,
        "more passes": "after 1 that are the same, ranks 0, 2 run nothing more, rank 1 runs stem.",
        "three ways": "after 1 that are the same, rank 0 runs b, rank 1 runs c, rank 2 runs head.",
        "same gradients": None,
        "unused everywhere": "c.weight (and 1 more) got no gradient on ranks 0-2.",
        "unused on two": "b.weight (and 1 more) got no gradient on ranks 0, 2.",
        "other order": "after 0 that are the same, ranks 0-1 have b.bias, rank 2 has head.bias.",
    }
    assert told.keys() == expected.keys()
    for name, messages in told.items():
        assert len(messages) == 3 and len(set(messages)) == 1
        part = expected[name]
        assert messages[0] is None if part is None else part in str(messages[0]), (name, messages[0])


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a tiny WavLM and Llama: only parts with a past can be frozen or adapted."""
    folder, made = tmp_path_factory.mktemp("pretrained"), tiny.recipe(Path("none"))
    WavLMModel(WavLMConfig(**(made.audio.config or {}))).save_pretrained(folder / "audio")
    LlamaForCausalLM(LlamaConfig(**(made.text.config or {}), vocab_size=320)).save_pretrained(folder / "text")
    return {"audio": str(folder / "audio"), "text": str(folder / "text")}


@pytest.mark.parametrize("count", [12, pytest.param(60, marks=pytest.mark.slow)])
def test_the_double_flow_runs_the_same_modules_whatever_clips_lack(
    count: int, pretrained: dict[str, Any], tmp_path: Path
) -> None:
    """Random recipes over random clips, other numbers of them on each rank, with other modalities, fillers among them,
    decoded or known before: every rank runs the same modules in the same order, and every trainable gets its gradient.
    The same model with one layer left out on rank 1 is caught each time.
    """
    found: list[dict[str, Any]] = run_ranks(
        "constructed",
        2,
        tmp_path,
        module="tests.sharding.work_agreement",
        seed=secrets.randbits(31),
        count=count,
        **pretrained,
    )
    assert len(found) == count
    assert [(row["said"][0], row["recipe"]) for row in found if row["said"][0]] == []
    assert any(row["presence"][0] != row["presence"][1] for row in found)
    for row in found:
        assert "rank 0 runs fusion.head.inner, rank 1 runs fusion.rnc_head.0." in str(row["said"][1])


def test_the_trainer_stops_before_a_faulty_model_changes(tmp_path: Path) -> None:
    """Every rank is told the same, in the step in which the fault begins."""
    data = tiny.write_corpus(tmp_path / "shards")
    found = run_ranks(
        "faulty", 2, tmp_path, module="tests.sharding.work_agreement", data=str(data), stages=[0, 1, 2, 3]
    )
    for stage, ((said, finished), other) in found.items():
        assert other == [said, finished]
        if stage == "3":
            assert finished == 1 and "got no gradient" in said and "fusion.head.weight" in said, said
        else:
            assert finished == 0 and "rank 0 runs fusion.head.inner, rank 1 runs fusion.rnc_head.0." in said, said
