"""MMSA's pickles, as pickle and numpy write them in every protocol."""

import pickle

import numpy as np
import pytest

SET_ASIDE = ("--on-bad-sample", "set_aside")


def part(rng, name, count, *, lengths=True):
    """One split; audio and vision are padded with zeros."""
    audio_lengths = rng.integers(1, 8, count)
    vision_lengths = rng.integers(1, 6, count)
    words = rng.integers(1, 5, count)
    mask = np.arange(5) < words[:, None]
    held = {
        "raw_text": np.array([f"Wörter {i}" for i in range(count)], dtype=object if count % 2 else None),
        "audio": rng.normal(size=(count, 8, 5)) * (np.arange(8) < audio_lengths[:, None])[..., None],
        "vision": (rng.normal(size=(count, 6, 3)) * (np.arange(6) < vision_lengths[:, None])[..., None]).astype("f4"),
        "id": np.array([f"{name}{i}$_${i}" for i in range(count)]),
        "text": rng.normal(size=(count, 5, 7)).astype(np.float32),
        "text_bert": np.stack([rng.integers(1, 99, (count, 5)) * mask, mask, 0 * mask], 1).astype(float),
        "annotations": ["Positive"] * count,
        "regression_labels": rng.uniform(-3, 3, count).astype(np.float32),
        "classification_labels": rng.integers(0, 3, count),
    }
    if lengths:
        held |= {"audio_lengths": audio_lengths.tolist(), "vision_lengths": vision_lengths.tolist()}
    return held, audio_lengths, vision_lengths, words


def write(importer, held, protocol=4):
    path = importer.folder / "unaligned.pkl"
    path.write_bytes(pickle.dumps(held, protocol))
    return path


@pytest.fixture
def corpus(importer):
    parts = {name: part(importer.rng, name, count) for name, count in {"train": 6, "valid": 3, "test": 2}.items()}
    return {name: one[0] for name, one in parts.items()}, {name: one[1:] for name, one in parts.items()}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_padding_is_cut(importer, corpus, protocol):
    held, lengths = corpus
    summary = importer.good("mmsa", write(importer, held, protocol))
    found = importer.samples()
    assert len(found) == 11
    for split, one in held.items():
        for i, key in enumerate(one["id"]):
            got, (audio, vision, words) = found[key], lengths[split]
            assert np.array_equal(got["audio"], one["audio"][i, : audio[i]].astype(np.float32))
            assert np.array_equal(got["vision"], one["vision"][i, : vision[i]])
            assert np.array_equal(got["text_features"], one["text"][i, : words[i]])
            assert got["text"] == one["raw_text"][i] and got["label"] == pytest.approx(one["regression_labels"][i])
            assert got["json"]["annotations"] == "Positive" and got["split"] == split
            assert got["json"]["classification_labels"] == one["classification_labels"][i]
    assert "train, valid, test: audio cut to its lengths" in summary and "text_bert is left out" in summary


def test_without_lengths_padding_is_kept_and_said(importer):
    held = part(importer.rng, "train", 4, lengths=False)[0]
    del held["text_bert"]
    summary = importer.good("mmsa", write(importer, {"train": held}))
    assert all(len(one["audio"]) == 8 for one in importer.samples().values())
    assert "train: audio has no lengths, its padding is kept" in summary


def test_bad_values_are_named(importer, corpus):
    held, _ = corpus
    train = held["train"]
    train["audio"][0, 0, 0] = -np.inf
    train["vision"][1, 0, 1] = np.nan
    train["audio_lengths"][2] = 9
    train["regression_labels"][3] = 3.2
    train["id"][4] = held["test"]["id"][0] = "same$_$1"
    train["vision_lengths"][5] = 0
    source = write(importer, held)
    found = importer.refused("mmsa", source)
    told = ["has 8 steps and is said to have 9", "label 3.2 is outside", "stands twice"]
    assert len(found) == 3 and all(one in line for one, line in zip(told, found, strict=True))
    summary = importer.good("mmsa", source, *SET_ASIDE)
    assert importer.set_aside().keys() == {"same$_$1", *(f"train{i}$_${i}" for i in range(4))}
    assert "1 clips have no vision in the source" in summary
    found = importer.samples()
    assert found["train5$_$5"]["vision"] is None and found["same$_$1"]["split"] == "train"


def test_columns_that_do_not_fit(importer, corpus):
    held, _ = corpus
    held["valid"]["audio"] = held["valid"]["audio"][:2]
    assert "valid, audio: has 2 entries, regression_labels has 3" in importer.refused("mmsa", write(importer, held))[0]
    held["valid"]["audio_lengths"] = ["many"] * 3
    held["valid"]["audio"] = importer.array(3, 8, 5)
    assert "holds what is no number" in importer.refused("mmsa", write(importer, held))[0]
    assert (
        "has no regression_labels_T"
        in importer.refused("mmsa", write(importer, held), "--label", "regression_labels_T")[0]
    )
    assert "has no train, valid or test" in importer.refused("mmsa", write(importer, {"fold1": held["test"]}))[0]
    assert "has no meaning with --from mmsa" in importer.refused("mmsa", write(importer, held), "--audio", "x")[0]


def test_empty_split_and_other_labels(importer, corpus):
    held, _ = corpus
    held["valid"] = part(importer.rng, "valid", 0)[0]
    for one in held.values():
        one["regression_labels_A"] = one["regression_labels"] / 3
    summary = importer.good("mmsa", write(importer, held), "--label", "regression_labels_A", "--label-range", -1, 1)
    assert "valid: no clips" in summary
    key = held["test"]["id"][0]
    one = importer.samples()[key]
    assert one["label"] == pytest.approx(held["test"]["regression_labels_A"][0])
    assert one["json"]["regression_labels"] == pytest.approx(held["test"]["regression_labels"][0])
