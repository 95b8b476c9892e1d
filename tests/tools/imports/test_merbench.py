"""MERBench's layout: a label .npz as numpy writes it, folders of .npy."""

import os

import numpy as np
import pytest

SET_ASIDE = ("--on-bad-sample", "set_aside")


class Harm:
    """Touches a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def corpus(importer):
    """Three splits; audio [T, D], text [D], vision as frames; returns what went in, by clip."""
    root = importer.folder / "mosei"
    for name in ("wavlm-FRA", "vicuna-UTT", "manet"):
        (root / "features" / name).mkdir(parents=True)
    labels: dict[str, dict] = {}
    clips = {}
    for split, count in {"train": 5, "val": 3, "test": 2}.items():
        labels[split] = {}
        for i in range(count):
            clip = f"{split}{i}_-ab$"
            steps = int(importer.rng.integers(1, 6))
            arrays = importer.array(steps, 6), importer.array(4), importer.array(steps, 3)
            np.save(root / "features" / "wavlm-FRA" / f"{clip}.npy", arrays[0])
            np.save(root / "features" / "vicuna-UTT" / f"{clip}.npy", arrays[1])
            frames = root / "features" / "manet" / clip
            frames.mkdir()
            for t, frame in enumerate(arrays[2]):
                np.save(frames / f"{t:04d}.npy", frame)
            value = float(importer.rng.uniform(-3, 3))
            labels[split][clip] = {"emo": "happy", "val": value}
            clips[clip] = (split, value, arrays)
    importer.labels, importer.root = labels, root
    write(importer)
    return clips


def write(importer, **more):
    corpora = {f"{split}_corpus": held for split, held in importer.labels.items()}
    np.savez_compressed(importer.root / "label.npz", **corpora, **more)


NAMES = ("--audio", "wavlm-FRA", "--text", "vicuna-UTT", "--vision", "manet")


def test_everything_comes_out(importer, corpus):
    summary = importer.good("merbench", importer.root, *NAMES)
    found = importer.samples()
    assert found.keys() == corpus.keys()
    for clip, (split, value, (audio, text, vision)) in corpus.items():
        one = found[clip]
        assert one["label"] == pytest.approx(value) and one["split"] == {"val": "valid"}.get(split, split)
        assert np.array_equal(one["audio"], audio) and np.array_equal(one["vision"], vision)
        assert np.array_equal(one["text_features"], text[None]) and one["json"]["emo"] == "happy"
    assert "5 train from train_corpus" in summary and "3 valid from val_corpus" in summary


def test_what_is_missing_is_told(importer, corpus):
    (importer.root / "features" / "wavlm-FRA" / "train1_-ab$.npy").unlink()
    np.save(importer.root / "features" / "wavlm-FRA" / "stray.npy", importer.array(2, 6))
    importer.labels["test2"] = {"other": {"val": 0.0}}
    importer.labels["train"]["nothing"] = {"emo": "sad", "val": 1.0}
    importer.labels["train"]["none_said"] = {"emo": "sad", "val": -10}
    importer.labels["train"]["no_val"] = {"emo": "sad"}
    importer.labels["train"]["../../etc/passwd"] = {"val": 0.0}
    importer.labels["train"]["far"] = {"val": 3.5}
    write(importer)
    np.save(importer.root / "features" / "wavlm-FRA" / "far.npy", importer.array(2, 6))
    errors = importer.refused("merbench", importer.root, *NAMES)
    told = ["nothing: has no modality", "none_said: has val -10", "no_val: has no 'val'", "passwd: is no file name"]
    told.append("far: label 3.5 is outside")
    assert len(errors) == len(told) and all(any(one in line for line in errors) for one in told)
    summary = importer.good("merbench", importer.root, *NAMES, *SET_ASIDE)
    assert importer.set_aside().keys() == {"nothing", "none_said", "no_val", "______etc_passwd", "far"}
    assert importer.samples()["train1_-ab$"]["audio"] is None
    record = importer.record()
    assert record["without"] == {"audio": ["train1_-ab$"]}
    assert {one["name"] for one in record["left_out"]} == {"other", "audio: stray.npy"}
    assert "1 clips have no audio in the source" in summary and "1 left out: test2_corpus is no split" in summary


def test_bad_features(importer, corpus):
    folder = importer.root / "features" / "wavlm-FRA"
    nan = importer.array(3, 6)
    nan[1, 2] = np.nan
    np.save(folder / "train0_-ab$.npy", nan)
    np.save(folder / "train1_-ab$.npy", importer.array(3, 7))
    np.save(folder / "train2_-ab$.npy", np.array([[{}]], object), allow_pickle=True)
    os.truncate(folder / "train3_-ab$.npy", 130)
    np.save(importer.root / "features" / "manet" / "train4_-ab$" / "9999.npy", importer.array(2, 3))
    errors = importer.refused("merbench", importer.root, *NAMES)
    told = [
        "NaN or infinite values (1 of 18)",
        "has width 7",
        "pickled objects",
        "is truncated or lies",
        "9999.npy of shape",
    ]
    assert len(errors) == 5 and all(one in line for one, line in zip(told, errors, strict=True))
    importer.good("merbench", importer.root, *NAMES, *SET_ASIDE, "--fill-non-finite")
    assert len(importer.set_aside()) == 4 and importer.record()["filled"] == ["train0_-ab$"]
    nan[1, 2] = 0
    assert np.array_equal(importer.samples()["train0_-ab$"]["audio"], nan)


def test_harm_in_the_labels(importer, corpus):
    canary = importer.folder / "ran"
    importer.labels["train"]["x"] = Harm(canary)
    write(importer)
    assert "posix.system would have to be made" in importer.refused("merbench", importer.root, *NAMES)[0]
    assert not canary.exists()
    os.truncate(importer.root / "label.npz", 300)
    assert "is damaged, or no .npz" in importer.refused("merbench", importer.root, *NAMES)[0]


def test_names_that_are_not_there(importer, corpus):
    errors = importer.refused("merbench", importer.root, "--audio", "hubert", "--vision", "clip")
    assert len(errors) == 2 and all("manet, vicuna-UTT, wavlm-FRA" in line for line in errors)
    assert "which folders hold the features is not said" in importer.refused("merbench", importer.root)[0]
    assert "has no meaning" not in importer.refused("merbench", importer.root, "--splits", "test=test9", *NAMES)[0]
    (importer.root / "more.npz").touch()
    assert "holds 2 .npz files" in importer.refused("merbench", importer.root, *NAMES)[0]


def test_emotions_without_numbers_are_listed(importer, corpus):
    next(iter(importer.labels["val"].values()))["emo"] = "sad"
    write(importer)
    (error,) = importer.refused("merbench", importer.root, *NAMES, "--label", "emo")
    assert (
        "holds classes (happy, sad)" in error and "--classes happy,sad" in error and "--labels happy=-1,sad=1" in error
    )


def test_emotions_with_numbers_and_transcripts(importer, corpus):
    lines = [f'{clip},"„{clip}“, said"' for clip in corpus]
    (importer.root / "transcription.csv").write_text("\n".join(["name,english", *lines]))
    options = ("--label", "emo", "--labels", "happy=1", "--transcript", "transcription.csv", "--splits", "train=test")
    importer.good("merbench", importer.root, *NAMES, *options)
    found = importer.samples()
    assert found.keys() == {"test0_-ab$", "test1_-ab$"}
    for clip, one in found.items():
        assert one["label"] == 1 and one["split"] == "train" and one["text"] == f"„{clip}“, said"
        assert one["json"]["val"] == pytest.approx(corpus[clip][1])
