"""Sound tracks and frames of films, from manifests, MELD and CH-SIMS."""

import csv
import os

import numpy as np
import pytest
import soundfile
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

from tests.tools.imports.films import write_film

SET_ASIDE = ("--on-bad-sample", "set_aside")
SENTIMENTS = "positive=1,neutral=0,negative=-1"
SIMS = ["video_id", "clip_id", "text", "label", "label_T", "label_A", "label_V", "annotation", "mode"]


def sound(rng, seconds=1.0, rate=16000, channels=1):
    return rng.integers(-9000, 9000, (channels, int(seconds * rate))).astype(np.int16)


def pictures(rng, count=10):
    return np.repeat(rng.integers(0, 256, (count, 1, 1, 3)), 32, 1).repeat(48, 2).astype(np.uint8)


def write_table(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *rows])


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A tiny image encoder. Its folder is a classifier's: the pooler of the model that is loaded is random."""
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_sound_tracks_from_a_manifest(importer):
    pcm = {
        name: sound(importer.rng, channels=channels) for name, channels in {"a.mkv": 1, "b.avi": 2, "c.mp4": 1}.items()
    }
    for name, samples in pcm.items():
        write_film(importer.folder / name, samples, 16000, pictures(importer.rng))
    soft = sound(importer.rng, rate=44100)
    write_film(importer.folder / "d.mkv", soft, 44100)
    rows = [[name[0], name, 0, "train"] for name in (*pcm, "d.mkv")]
    write_table(importer.folder / "m.csv", ["key", "audio", "label", "split"], rows)
    summary = importer.good("", importer.folder / "m.csv")
    found = importer.samples()
    assert np.array_equal(found["a"]["audio"], pcm["a.mkv"][0] / np.float32(32768))
    assert np.abs(found["b"]["audio"] - pcm["b.avi"].mean(0) / 32768).max() < 1e-4
    assert abs(len(found["c"]["audio"]) - 16000) <= 2048 and abs(len(found["d"]["audio"]) - 16000) <= 1
    assert "4 clips are films, of which the sound track alone is taken" in summary
    assert "1 audio files resampled" in summary and "1 audio files averaged to mono" in summary


def test_bad_films_are_named(importer):
    rng, folder = importer.rng, importer.folder
    for name in ("cut.mkv", "cut.mp4", "half.mkv", "half.avi"):
        write_film(folder / name, sound(rng, 4), 16000, pictures(rng, 40))
    for name, share in {"cut.mkv": 0.02, "cut.mp4": 0.5, "half.mkv": 0.5, "half.avi": 0.5}.items():
        os.truncate(folder / name, int(share * (folder / name).stat().st_size))
    write_film(folder / "mute.mp4", None, 16000, pictures(rng))
    (folder / "zero.mp4").touch()
    (folder / "noise.avi").write_bytes(rng.bytes(5000))
    secret = folder / "secret.wav"
    soundfile.write(secret, np.zeros(16000), 16000)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{secret}\n#EXT-X-ENDLIST\n"
    (folder / "playlist.mp4").write_text(playlist)
    (folder / "concat.mkv").write_text(f"ffconcat version 1.0\nfile {secret}\n")
    (folder / "text.mkv").write_text("key,label\n")
    names = sorted(path.name for path in folder.iterdir() if path.name != "secret.wav")
    write_table(
        folder / "m.csv", ["key", "audio", "label", "split"], [[n.replace(".", "_"), n, 0, "train"] for n in names]
    )
    errors = importer.refused("", folder / "m.csv")
    assert len(errors) == len(names) == 10
    for name, line in zip(names, errors, strict=True):
        told = "no sound track" if name == "mute.mp4" else "truncated"
        assert name in line and told in line, line


def test_frames_become_vision(importer, encoder):
    frames = pictures(importer.rng, 20)
    write_film(importer.folder / "a.mkv", sound(importer.rng, 2), 16000, frames)
    write_table(importer.folder / "m.csv", ["key", "audio", "label", "split"], [["a", "a.mkv", 0, "train"]])
    options = ("--vision-encoder", encoder, "--frames-per-second", 5)
    importer.good("", importer.folder / "m.csv", *options)
    vision = importer.samples()["a"]["vision"]
    model = ViTModel.from_pretrained(encoder, add_pooling_layer=False).eval()
    pixels = ViTImageProcessor.from_pretrained(encoder)(images=list(frames[::2]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values=pixels).last_hidden_state.mean(1).numpy()
    assert vision.shape == (10, 8) and np.abs(vision - expected).max() < 1e-5
    importer.out = importer.folder / "more"
    assert "nothing to make features" in importer.refused("", importer.folder / "m.csv", "--frames-per-second", 5)[0]
    assert "needs frames per second" in importer.refused("", importer.folder / "m.csv", *options[:2])[0]
    assert (
        "there is no such file"
        in importer.refused("", importer.folder / "m.csv", *options[2:], "--vision-encoder", "./x")[0]
    )


@pytest.fixture
def meld(importer):
    """MELD's layout with sound tracks of distinct loudness; returns the samples by key."""
    root, held = importer.folder / "MELD.Raw", {}
    places = {
        "train": "train/train_splits",
        "dev": "dev/dev_splits_complete",
        "test": "test/output_repeated_splits_test",
    }
    columns = ["Sr No.", "Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID", "StartTime"]
    for split, place in places.items():
        rows = []
        (root / place).mkdir(parents=True)
        for number, sentiment in enumerate(("positive", "neutral", "negative")):
            key = f"{ {'dev': 'valid'}.get(split, split) }_dia0_utt{number}"
            held[key] = sound(importer.rng)
            write_film(root / place / f"dia0_utt{number}.mkv", held[key], 16000, pictures(importer.rng, 5))
            rows.append([number, "Also, “no”—", "Joey", "joy", sentiment, 0, number, "00:01,2"])
        write_table(root / f"{split}_sent_emo.csv", columns, rows)
    importer.source = root
    return held


def test_meld(importer, meld):
    assert "--labels positive=1" in importer.refused("meld", importer.source)[0]
    root = importer.source
    (root / "train/train_splits/dia0_utt1.mkv").unlink()
    write_film(root / "test/output_repeated_splits_test/final_videos_testdia9_utt0.mkv", sound(importer.rng), 16000)
    soundfile.write(root / "train/train_splits/dia7_utt7.wav", np.zeros(900), 16000)
    (root / "train/train_splits/._dia0_utt0.mkv").touch()
    summary = importer.good("meld", root, "--labels", SENTIMENTS)
    found = importer.samples()
    assert found.keys() == meld.keys()
    for key, one in found.items():
        if key != "train_dia0_utt1":
            assert np.array_equal(one["audio"], meld[key][0] / np.float32(32768))
        assert one["label"] == 1 - int(key[-1]) and one["text"] == "Also, “no”—" and one["json"]["Speaker"] == "Joey"
        assert one["json"]["Sentiment"] == ("positive", "neutral", "negative")[int(key[-1])]
    assert found["train_dia0_utt1"]["audio"] is None and "1 clips have no audio in the source" in summary
    assert sorted(one["reason"] for one in importer.record()["left_out"]) == [
        "media not called diaX_uttY",
        "media without a row in the tables",
    ]
    importer.out = importer.folder / "more"
    errors = importer.refused("meld", root, "--labels", "positive=1,neutral=0")
    assert len(errors) == 3 and "negative (not in --labels)" in errors[0]
    assert "is not a number" in importer.refused("meld", root, "--labels", "positive=good")[0]
    assert "has no column 'Valence'" in importer.refused("meld", root, "--label", "Valence")[0]


def test_meld_as_classes(importer, meld):
    names = ("--classes", "neutral,negative,good", "--labels", "positive=good")
    importer.good("meld", importer.source, *names)
    found = importer.samples()
    assert {key: one["label"] for key, one in found.items()} == {key: (2, 0, 1)[int(key[-1])] for key in meld}
    importer.out = importer.folder / "more"
    assert "'positive' is no class" in importer.refused("meld", importer.source, "--classes", "neutral,negative")[0]
    assert "--labels" in importer.refused("meld", importer.source, *names[:2], "--labels", "positive=best")[0]
    assert "twice" in importer.refused("meld", importer.source, "--classes", "neutral,neutral,good")[0]


def test_ch_sims_with_pictures(importer, encoder):
    root, held = importer.folder / "SIMS", {}
    rows = []
    for i, mode in enumerate(("train", "train", "valid", "test")):
        film = root / "Raw" / f"video_{i:04d}" / "0001.mp4"
        film.parent.mkdir(parents=True)
        held[i] = round(float(importer.rng.uniform(-1, 1)), 1)
        write_film(film, sound(importer.rng), 16000, pictures(importer.rng))
        rows.append([f"video_{i:04d}", "1", "我不想嫁给李茶", held[i], 0.2, -0.4, 0, "Positive", mode])
    rows.append(["video_0000", "0002", "没有", -0.2, 0, 0, 0, "Negative", "train"])
    rows.append(["video_0000", "0001", "两次", 0, 0, 0, 0, "Neutral", "test"])
    rows.append(["video_0001", "0003", "多", 1.5, 0, 0, 0, "Neutral", "test"])
    write_table(root / "label.csv", SIMS, rows)
    options = ("--label-range", -1, 1, "--vision-encoder", encoder, "--frames-per-second", 2)
    errors = importer.refused("chsims", root, *options)
    assert len(errors) == 1 and "label 1.5 is outside -1 … 1" in errors[0]
    summary = importer.good("chsims", root, *options, *SET_ASIDE)
    found = importer.samples()
    assert importer.set_aside().keys() == {"video_0001_0003"} and len(found) == 6
    for i, label in held.items():
        one = found[f"video_{i:04d}_1"]
        assert one["label"] == label and one["vision"].shape == (2, 8) and len(one["audio"]) > 14000
        assert one["text"] == "我不想嫁给李茶" and one["json"]["label_A"] == "-0.4"
    assert "2 clips have no audio in the source" in summary and "2 frames per second" in summary
    without = importer.record()["without"]  # the pictures of films are vision
    assert "2 clips have no vision in the source" in summary and without["vision"] == without["audio"]
    importer.out = importer.folder / "wide"
    write_table(root / "label.csv", SIMS, rows[:4])
    assert "--label-range -1 1 says what they are" in importer.good("chsims", root)
    write_table(root / "label.csv", SIMS[:-1], [row[:-1] for row in rows])
    importer.out = importer.folder / "third"
    assert "has no column 'mode'" in importer.refused("chsims", root)[0]
