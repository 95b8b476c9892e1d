"""Any modality may be missing: which one, what is left of the inputs, and the same training on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_train.missing import Streams, draw_dropped, has_teacher, without
from dist_train.names import MODALITIES
from dist_train.packed import TextStates
from tests.dist_train.work_systems import SYSTEMS
from tests.ranks import run_ranks
from tests.tiny import write_corpus

PRESENT = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=9)


@given(PRESENT, st.integers(0, 2**40), st.integers(0, 99), st.permutations(range(9)))
def test_the_draw_is_a_function_of_seed_epoch_and_clip(
    present: list[tuple[bool, bool, bool]], seed: int, epoch: int, order: list[int]
) -> None:
    """Whatever batch a clip is in; one modality each, of those it has if it has another."""
    has, index = torch.tensor(present), [7 * i for i in range(len(present))]
    drawn = draw_dropped("random", has, index, seed, epoch)
    assert (drawn.sum(1) == 1).all()
    assert ((drawn & has).any(1) == (has.sum(1) > 1)).all()
    chosen = [i for i in order if i < len(present)]
    again = draw_dropped("random", has[chosen], [index[i] for i in chosen], seed, epoch)
    assert torch.equal(again, drawn[chosen])


def test_every_modality_is_drawn_alike_and_anew_in_each_epoch() -> None:
    has = torch.ones(3000, 3, dtype=torch.bool)
    first, second = (draw_dropped("random", has, range(3000), 1, epoch) for epoch in (0, 1))
    for drawn in (first, second):
        assert (drawn.float().mean(0) - 1 / 3).abs().max() < 0.05
    assert 0.2 < (first & second).any(1).float().mean() < 0.45


@pytest.mark.parametrize("missing", MODALITIES)
def test_a_fixed_modality(missing: str) -> None:
    drawn = draw_dropped(missing, torch.zeros(2, 3), [0, 1], 0, 0)  # type: ignore[arg-type]
    assert drawn.tolist() == [[name == missing for name in MODALITIES]] * 2


def streams(rows: int) -> tuple[Streams, TextStates]:
    def made(width: int) -> TextStates:
        length = int(torch.randint(1, 6, ()))
        mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 1))
        return TextStates(torch.randn(rows, length, width), mask)

    return Streams(made(4), made(3), made(2)), made(3)


def test_what_is_left() -> None:
    """For all eight combinations: what stays is the same set of steps, what goes is one zero step."""
    whole, simulated = streams(8)
    dropped = torch.tensor([[bool(row >> m & 1) for m in range(3)] for row in range(8)])
    left = without(whole, simulated, dropped)
    for row in range(8):
        audio, text, vision = dropped[row].tolist()
        sources = [None if audio else whole.audio, whole.text, None if vision else whole.vision]
        if text:
            sources[1] = None if audio else simulated  # from no audio nothing can be imagined
        for found, source, full in zip(left, sources, whole, strict=True):
            steps = found.states[row][found.mask[row]]
            expected = (
                torch.zeros_like(full.states[row, :1]) if source is None else source.states[row][source.mask[row]]
            )
            torch.testing.assert_close(steps, expected, rtol=0, atol=0)


def test_the_transcript_is_not_touched_where_every_clip_does_without() -> None:
    whole, simulated = streams(3)
    poisoned = whole._replace(text=TextStates(torch.full_like(whole.text.states, torch.nan), whole.text.mask))
    left = without(poisoned, simulated, torch.tensor([[False, True, False]] * 3))
    assert left.text is simulated and left.audio is whole.audio and left.vision is whole.vision


def test_a_clip_that_never_had_it_has_no_teacher() -> None:
    batch = {f"{name}_present": torch.tensor([True, name != "vision"]) for name in MODALITIES}
    batch["dropped"] = torch.tensor([[False, False, True]] * 2)
    assert has_teacher(batch).tolist() == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_systems_train_alike_at_every_stage(system: str, tmp_path: Path) -> None:
    """Two real ranks, ZeRO 0, 2 and 3, the census on: every trainable learns, the losses fall and are the same."""
    data = write_corpus(tmp_path / "data", train=48)
    found = run_ranks("stages", 2, tmp_path, module="tests.dist_train.work_systems", data=str(data), system=system)
    assert sum(found["0"][-4:]) < sum(found["0"][:4])
    for stage, losses in found.items():
        assert losses == pytest.approx(found["0"], rel=2e-3), stage
