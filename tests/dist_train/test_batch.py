from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from dist_train.batch import Batch, Collator, DataSettings, pad
from sharding.errors import UserError
from tests import tiny

SECOND = 16_000


def collator(tokenizer: PreTrainedTokenizerBase, *, set_aside: bool = False, **changes: Any) -> Collator:
    made = tiny.recipe(Path("none"), **changes)
    data = DataSettings(path="none", on_bad_sample="set_aside" if set_aside else "stop")
    widths = {"audio": 3, "text": 4, "vision": tiny.VISION_WIDTH}
    return Collator(tokenizer, data, made.audio, made.text, minimum_audio=1000, widths=widths)


def sample(index: int = 0, *, real: bool = True, **changes: Any) -> dict[str, Any]:
    found = tiny.clip(np.random.default_rng(), audio=True, text=True, vision=True)
    return {"key": f"k{index}", "index": index, "real": real, **found, **changes}


def check(batch: Batch, name: str, rows: list[np.ndarray | None], minimum: int, fill: float = 0) -> None:
    """Every row of one modality against a plain rule."""
    values, mask, present = batch[name], batch[f"{name}_mask"], batch[f"{name}_present"]  # type: ignore[literal-required]
    assert values.shape[1] == max(max(0 if row is None else len(row), minimum) for row in rows)
    for row, expected in enumerate(rows):
        length = max(0 if expected is None else len(expected), minimum)
        assert mask[row].tolist() == [True] * length + [False] * (values.shape[1] - length)
        assert bool(present[row]) == (expected is not None)
        filled = 0 if expected is None else len(expected)
        assert (values[row, filled:] == fill).all()
        if expected is not None:
            assert np.array_equal(values[row, :filled].numpy(), expected)


def test_modalities_are_padded_with_masks(tokenizer: PreTrainedTokenizerBase) -> None:
    samples = [
        sample(0),
        sample(1, audio=None, vision=None),
        sample(2, text=None),
        sample(3, audio=np.full(7, 0.5, np.float32), text=""),
    ]
    batch = collator(tokenizer)(samples)
    check(batch, "audio", [each["audio"] for each in samples], 1000)
    check(batch, "vision", [each["vision"] for each in samples], 1)
    tokens = [None if each["text"] is None else np.asarray(tokenizer(each["text"]).input_ids) for each in samples]
    assert tokens[3].tolist() == [tokenizer.bos_token_id]  # type: ignore[union-attr]
    check(batch, "text", tokens, 1, fill=tokenizer.bos_token_id)
    assert batch["text"].dtype == torch.long
    assert batch["label"].tolist() == pytest.approx([each["label"] for each in samples])
    assert batch["index"].tolist() == [0, 1, 2, 3]
    assert batch["real"].tolist() == [True] * 4 and batch["set_aside"] == []


def test_features_are_padded_with_masks(tokenizer: PreTrainedTokenizerBase) -> None:
    rng = np.random.default_rng()
    samples = []
    for index, length in enumerate((5, 1200, 1)):
        audio, text = (rng.normal(size=(length, width)).astype(np.float32) for width in (3, 4))
        samples.append(sample(index, audio=audio, text_features=text))
    samples.append(sample(3, audio=None, text_features=None))
    batch = collator(tokenizer, audio={"input": "features"}, text={"input": "features"})(samples)
    check(batch, "audio", [each["audio"] for each in samples], 1000)
    check(batch, "text", [each["text_features"] for each in samples], 1)
    assert batch["text"].dtype == torch.float32


def test_a_batch_in_which_nothing_is_present(tokenizer: PreTrainedTokenizerBase) -> None:
    batch = collator(tokenizer)([sample(audio=None, text=None, vision=None)] * 2)
    assert batch["audio"].shape == (2, 1000) and batch["text"].shape == (2, 1)
    assert batch["vision"].shape == (2, 1, tiny.VISION_WIDTH)
    assert not any(batch[f"{name}_present"].any() for name in ("audio", "text", "vision"))  # type: ignore[literal-required]
    assert all(batch[f"{name}_mask"].all() for name in ("audio", "text", "vision"))  # type: ignore[literal-required]


@given(
    st.lists(st.none() | st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 4), st.none() | st.integers(1, 3)
)
def test_padding(lengths: list[int | None], minimum: int, width: int | None) -> None:
    rng = np.random.default_rng(0)
    shape = () if width is None else (width,)
    rows = [None if length is None else rng.normal(size=(length, *shape)).astype(np.float32) for length in lengths]
    padded, mask, present = pad(rows, width, minimum, fill=3)
    assert mask.sum(1).tolist() == [max(length or 0, minimum) for length in lengths]
    assert padded.shape == (len(rows), int(mask.sum(1).max()), *shape)
    assert present.tolist() == [row is not None for row in rows]
    for values, row in zip(padded.numpy(), rows, strict=True):
        count = 0 if row is None else len(row)
        assert row is None or np.array_equal(values[:count], row)
        assert (values[count:] == 3).all()


TOO_LONG = [
    ({"audio": np.zeros(3 * SECOND, np.float32)}, "lasts 3.0 s", "audio.max_seconds"),
    ({"text": "really awful " * 5000}, "tokens", "text.max_tokens"),
]


@pytest.mark.parametrize(("change", "problem", "key"), TOO_LONG)
def test_what_is_too_long_stops_or_is_set_aside(
    change: dict[str, Any], problem: str, key: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    limits: dict[str, Any] = {"audio": {"max_seconds": 2.0}, "text": {"max_tokens": 30}}
    samples = [sample(0), sample(1, **change), sample(0, real=False), sample(1, real=False, **change)]
    with pytest.raises(UserError, match=f"sample k1.*{problem}.*{key}.*set_aside"):
        collator(tokenizer, **limits)(samples)
    batch = collator(tokenizer, set_aside=True, **limits)(samples)
    assert batch["real"].tolist() == [True, False, False, False]
    assert len(batch["set_aside"]) == 1  # not once more for its filler
    assert batch["set_aside"][0].startswith("k1: ") and problem in batch["set_aside"][0]
    assert batch["audio_present"].tolist() == batch["text_present"].tolist() == [True, False, True, False]
    assert batch["audio"].shape[1] < 2 * SECOND and batch["text"].shape[1] <= 30


def test_limits_are_inclusive(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "really awful film"
    longest = len(tokenizer(text).input_ids)
    limits: dict[str, Any] = {"audio": {"max_seconds": 1.0}, "text": {"max_tokens": max(longest, 8)}}
    audio = np.ones(SECOND, np.float32)
    assert collator(tokenizer, **limits)([sample(audio=audio, text=text)])["real"].all()
    with pytest.raises(UserError, match="lasts"):
        collator(tokenizer, **limits)([sample(audio=np.ones(SECOND + 1600, np.float32), text=text)])


def test_what_the_reader_has_set_aside_is_told(tokenizer: PreTrainedTokenizerBase) -> None:
    gone = sample(4, real=False, audio=None, text=None, vision=None, set_aside="the tar is truncated")
    batch = collator(tokenizer)([sample(0), gone])
    assert batch["set_aside"] == ["k4: the tar is truncated"]
    assert batch["real"].tolist() == [True, False]
