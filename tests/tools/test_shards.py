"""`dist-train shards make | inspect | verify`: good corpora come out exact, every kind of bad input is named."""

import csv
import io
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import webdataset

from sharding.errors import UserError, UserErrors
from sharding.shards import load_dataset, load_info
from sharding.stream import ShardedSplit
from tests.corpus import forbidden_directory, small_disk
from tools import shards

EMODB = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "emodb_flac"
OPTIONS: dict[str, Any] = {
    "workers": 1,
    "samples_per_shard": 4,
    "on_bad_sample": "stop",
    "label_range": (-3, 3),
}


class Corpus:
    """A folder with a manifest that grows row by row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self.rng = np.random.default_rng()

    def wav(self, name, samples=None, rate=16000, **options):
        samples = self.rng.uniform(-0.5, 0.5, 2000) if samples is None else samples
        soundfile.write(self.folder / name, samples, rate, **options)
        return name

    def npy(self, name, array=None, **options):
        array = self.rng.normal(size=(self.rng.integers(1, 9), 5)).astype(np.float32) if array is None else array
        np.save(self.folder / name, array, **options)
        return name

    def add(self, key, label=0.0, split="train", **cells):
        self.rows.append({"key": key, "label": label, "split": split, **cells})

    def good(self, n):
        for i in range(n):
            split = ("train", "train", "valid", "test")[i % 4]
            self.add(
                f"g{i}", i % 5 - 2, split, audio=self.wav(f"g{i}.wav"), text=f"t {i}", vision=self.npy(f"g{i}.npy")
            )

    def write_manifest(self):
        columns = sorted({name for row in self.rows for name in row})
        with (self.folder / "m.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def make(self, out="out", **options):
        self.write_manifest()
        options = OPTIONS | options
        shards.make(self.folder / "m.csv", self.folder / out, shards.Making(**options))
        return self.folder / out

    def errors(self, **options):
        """The error lines of a `make` that leaves nothing behind."""
        before = {path.name for path in self.folder.iterdir()} | {"m.csv"}
        with pytest.raises((UserError, UserErrors)) as caught:
            self.make(**options)
        assert {path.name for path in self.folder.iterdir()} == before
        return [str(error) for error in getattr(caught.value, "errors", [caught.value])]


@pytest.fixture
def corpus(tmp_path):
    return Corpus(tmp_path)


def content(root):
    return {path.name: path.read_bytes() for path in root.iterdir()}


def test_workers_do_not_change_a_byte(corpus, capsys):
    corpus.good(40)
    alone, several = corpus.make("one"), corpus.make("three", workers=3)
    assert content(alone) == content(several) and len(content(alone)) == 2 * (5 + 3 + 3) + 3 + 1
    assert load_info(corpus.make("wide", samples_per_shard=100)).content_hash == load_info(alone).content_hash
    assert "Written to" in capsys.readouterr().out


def test_samples_come_out_as_they_went_in(corpus):
    pcm = corpus.rng.integers(-32768, 32768, 4000).astype(np.int16)
    vision = corpus.rng.normal(size=(6, 5))
    text = corpus.rng.normal(size=(3, 7)).astype(np.float32)
    corpus.wav("a.wav", pcm)
    corpus.wav("b.flac", pcm)
    corpus.add("a", -2.25, audio="a.wav", text="Ünïcode, „quoted“", vision=corpus.npy("v.npy", vision), speaker="Ann")
    corpus.add("b", 1, audio="b.flac", text_features=corpus.npy("t.npy", text))
    corpus.add("c", 3, text="only text")
    out = corpus.make()
    a, b, c = (ShardedSplit(out, "train")[i] for i in range(3))
    assert np.array_equal(a["audio"], (pcm / 32768).astype(np.float32)) and np.array_equal(a["audio"], b["audio"])
    assert a["text"] == "Ünïcode, „quoted“" and a["label"] == -2.25
    assert np.array_equal(a["vision"], vision.astype(np.float32)) and np.array_equal(b["text_features"], text)
    assert [c[name] for name in ("audio", "text", "vision")] == [None, "only text", None]
    plain = next(iter(webdataset.WebDataset(str(out / "train-000000.tar"), shardshuffle=False)))
    assert json.loads(plain["json"]) == {"key": "a", "label": -2.25, "split": "train", "speaker": "Ann"}
    assert load_info(out).splits["train"].missing == {"audio": 1, "text": 0, "vision": 2}


def test_feature_corpus_without_any_text(corpus):
    for i in range(6):
        split = ("train", "test")[i % 2]
        audio = corpus.npy(f"a{i}.npy", corpus.rng.normal(size=(20, 74)))
        corpus.add(f"k{i}", 0, split, audio=audio, vision=corpus.npy(f"v{i}.npy", corpus.rng.normal(size=(20, 36))))
    info = load_info(corpus.make())
    assert (info.dims.audio, info.dims.text, info.dims.vision) == (74, None, 36)
    assert info.splits["train"].missing == {"audio": 0, "text": 3, "vision": 0}


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled_and_said(corpus, capsys, rate):
    seconds, hertz = 0.5, 440
    tone = 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)
    corpus.add("a", audio=corpus.wav("a.wav", tone, rate, subtype="FLOAT"))
    corpus.add("b", audio=corpus.wav("b.wav"))
    audio = ShardedSplit(corpus.make(), "train")[0]["audio"]
    expected = 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(16000 * seconds)) / 16000)
    assert abs(len(audio) - len(expected)) <= 1
    middle = slice(500, -500)  # the resampler's filter reaches over the ends
    assert np.abs(audio[: len(expected)][middle] - expected[: len(audio)][middle]).max() < 1e-3
    assert "1 audio files resampled to 16 kHz" in capsys.readouterr().out


def test_stereo_is_averaged_and_loud_is_clipped_and_said(corpus, capsys):
    stereo = corpus.rng.uniform(-1, 1, (3000, 2)).astype(np.float32)
    corpus.add("a", audio=corpus.wav("a.wav", stereo, subtype="FLOAT"))
    corpus.add("b", audio=corpus.wav("b.wav", np.full(3000, 1.7), subtype="FLOAT"))
    split = ShardedSplit(corpus.make(), "train")
    assert np.abs(split[0]["audio"] - stereo.mean(axis=1)).max() <= 0.5 / 32768 + 1e-7
    assert split[1]["audio"].min() > 0.9999
    printed = capsys.readouterr().out
    assert "1 audio files averaged to mono" in printed and "1 audio files clipped" in printed


def _bad_files(corpus):
    """{key: (column, file, expected problem)}: all the ways a file can be bad."""
    rng, folder = corpus.rng, corpus.folder
    long = rng.uniform(-0.5, 0.5, 8000)
    for name in ("cut.wav", "cut.flac", "cut.mp3"):
        corpus.wav(name, long)
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    (folder / "zero.wav").write_bytes(b"")
    (folder / "noise.wav").write_bytes(rng.bytes(5000))
    (folder / "header.wav").write_bytes(b"RIFF\x24\x00\x00\x00WAVEfmt ")
    (folder / "noise.npy").write_bytes(rng.bytes(500))
    (folder / "zero.npy").write_bytes(b"")
    np.savez(folder / "archive", a=np.zeros((2, 5)))
    (folder / "archive.npz").rename(folder / "archive.npy")
    corpus.npy("cut.npy", np.zeros((100, 5)))
    os.truncate(folder / "cut.npy", 1000)
    nan, infinite, huge = (np.zeros((4, 5)) for _ in range(3))
    nan[2, 3], infinite[0, 0], huge[1, 1] = np.nan, -np.inf, 1e300
    nan_wav = long.astype(np.float32)
    nan_wav[77] = np.nan
    return {
        "cut_wav": ("audio", "cut.wav", "is truncated"),
        "cut_flac": ("audio", "cut.flac", "truncated"),
        "cut_mp3": ("audio", "cut.mp3", "is truncated"),
        "zero_wav": ("audio", "zero.wav", "cannot be decoded"),
        "noise_wav": ("audio", "noise.wav", "cannot be decoded"),
        "header_wav": ("audio", "header.wav", "cannot be decoded"),
        "empty_wav": ("audio", corpus.wav("empty.wav", np.zeros(0)), "is empty"),
        "short_wav": ("audio", corpus.wav("short.wav", np.zeros(399)), "is too short"),
        "nan_wav": ("audio", corpus.wav("nan.wav", nan_wav, subtype="FLOAT"), "holds NaN"),
        "mixed": ("audio", corpus.npy("mixed.npy"), "is features, most audio of this corpus is waveforms"),
        "noise_npy": ("vision", "noise.npy", "is no .npy file"),
        "zero_npy": ("vision", "zero.npy", "is no .npy file"),
        "archive": ("vision", "archive.npy", "is an archive"),
        "cut_npy": ("vision", "cut.npy", "is truncated or lies"),
        "rank_1": ("vision", corpus.npy("r1.npy", np.zeros(5)), "has rank 1"),
        "rank_3": ("vision", corpus.npy("r3.npy", np.zeros((2, 5, 1))), "has rank 3"),
        "width": ("vision", corpus.npy("w.npy", np.zeros((2, 6))), "has width 6, most files of this corpus have 5"),
        "empty_npy": ("vision", corpus.npy("e.npy", np.zeros((0, 5))), "is empty"),
        "nan_npy": ("vision", corpus.npy("nan.npy", nan), "holds NaN or infinite"),
        "inf_npy": ("vision", corpus.npy("inf.npy", infinite), "holds NaN or infinite"),
        "huge_npy": ("vision", corpus.npy("huge.npy", huge), "holds NaN or infinite"),
        "text_npy": ("vision", corpus.npy("text.npy", np.full((2, 5), "x")), "has type <U1"),
        "pickled": ("vision", corpus.npy("p.npy", np.array([[{}]], dtype=object)), "pickled objects"),
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_every_bad_file_is_named(corpus, workers):
    bad = _bad_files(corpus)
    for key, (column, name, _) in bad.items():
        corpus.add(key, **{column: name})
    corpus.good(30)  # after the bad ones: the width of the corpus is what most files have
    found = corpus.errors(workers=workers)
    assert len(found) == len(bad)
    for (key, (_, name, problem)), line in zip(bad.items(), found, strict=True):
        assert line.startswith(f"sample {key}, {corpus.folder / name}: ") and problem in line and "\n" not in line


def test_bad_files_are_set_aside_and_counted(corpus, capsys):
    corpus.good(30)
    whole = load_info(corpus.make("whole"))
    bad = _bad_files(corpus)
    for key, (column, name, _) in bad.items():
        corpus.add(key, **{column: name})
    corpus.rows = corpus.rows[::-1]
    info = load_info(corpus.make(on_bad_sample="set_aside", workers=2))
    assert {aside.key for aside in info.set_aside} == set(bad) and len(info.set_aside) == len(bad)
    for aside in info.set_aside:
        assert bad[aside.key][1] in aside.reason and bad[aside.key][2] in aside.reason
    assert info.content_hash == whole.content_hash
    assert f"{len(bad)} samples set aside" in capsys.readouterr().out
    shards.verify(corpus.folder / "out")


def test_nothing_but_bad_files(corpus):
    corpus.add("a", audio=corpus.wav("a.wav", np.zeros(0)))
    assert "is empty" in corpus.errors(on_bad_sample="set_aside")[0]


def test_manifest_errors_stop_before_any_work(corpus):
    corpus.good(3)
    corpus.add("g0", 7, audio="gone.wav")
    assert len(corpus.errors()) == 3


def test_long_text_goes_through_and_is_said(corpus, capsys):
    text = "token " * 10_000
    corpus.add("long", text=text)
    assert ShardedSplit(corpus.make(), "train")[0]["text"] == text.strip()
    assert "1 long texts" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [{"workers": 0}, {"samples_per_shard": 0}, {"on_bad_sample": "skip"}, {"label_range": (1, -1)}]
)
def test_bad_settings(corpus, options):
    corpus.good(1)
    assert len(corpus.errors(**options)) == 1


def test_out_exists(corpus):
    corpus.good(2)
    before = content(corpus.make())
    assert "exists" in corpus.errors()[0]
    assert content(corpus.folder / "out") == before


@pytest.mark.parametrize("workers", [1, 2])
def test_disk_full(corpus, workers):
    for i in range(10):
        corpus.add(f"k{i}", audio=corpus.wav(f"{i}.wav", corpus.rng.uniform(-1, 1, 40_000)))
    corpus.make("room")
    with small_disk(corpus.folder / "disk", 500_000) as disk:
        assert "disk full" in corpus.errors(out="disk/out", workers=workers, samples_per_shard=100)[0]
        assert list(disk.iterdir()) == []


def test_no_write_permission(corpus):
    corpus.good(2)
    with forbidden_directory(corpus.folder / "forbidden"):
        assert "no write permission" in corpus.errors(out="forbidden/out")[0]


def _make_in_child(folder, pipe):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    options = OPTIONS | {"workers": 2}
    try:
        shards.make(folder / "m.csv", folder / "out", shards.Making(**options))
    except UserError as error:
        pipe.send(str(error))


def test_ctrl_c_leaves_nothing(corpus):
    corpus.good(4)
    corpus.rows = [row | {"key": f"k{i}"} for i in range(600) for row in [corpus.rows[i % 4]]]
    corpus.write_manifest()
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=_make_in_child, args=(corpus.folder, there))
    child.start()
    deadline = time.monotonic() + 60
    while not list(corpus.folder.glob(".out.partial-*/*-000002.tar")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGINT)
    child.join(60)
    assert here.poll(1) and "interrupted" in here.recv()
    assert not list(corpus.folder.glob("*out*"))
    assert "Traceback" not in (corpus.folder / "stderr").read_text()


def test_inspect(corpus, capsys):
    corpus.good(12)
    corpus.add("bare [bold]", 2.5, text="[red]markup[/red] stays")
    out = corpus.make()
    capsys.readouterr()
    shards.inspect(out, as_json=True)
    found = json.loads(capsys.readouterr().out)
    train = found["splits"]["train"]
    assert train["samples"] == 7 and train["missing"] == {"audio": 1, "text": 0, "vision": 1}
    frames = [len(np.load(corpus.folder / row["vision"])) for row in corpus.rows[:12] if row["split"] == "train"]
    quantiles = train["lengths"]["vision_frames"]["quantiles"]
    assert quantiles["0.5"] == np.median(frames) and quantiles["1.0"] == max(frames)
    assert sum(train["lengths"]["audio_seconds"]["counts"]) == 6 == train["lengths"]["audio_seconds"]["clips"]
    for split in found["splits"]:
        keys = sorted(row["key"] for row in corpus.rows if row["split"] == split)
        assert [sample["key"] for sample in found["samples"] if sample["split"] == split] == keys[:2]

    shards.inspect(out, as_json=False)
    printed = capsys.readouterr().out
    for word in ("train", "valid", "test", "no vision", "Lengths", "Labels", "g0", "waveform"):
        assert word in printed


def test_bars():
    assert shards.bars([0, 1, 4, 8]) == " ▁▄█"
    assert shards.bars([0, 1, 1000]) == " ▁█"  # what is there is seen
    assert shards.bars([]) == "" and shards.bars([0, 0]) == "  "


def _flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_verify_names_everything_bad(corpus, capsys):
    corpus.good(40)
    out = corpus.make()
    shards.verify(out)
    assert "40 samples, every checksum is right" in capsys.readouterr().out
    indexes = load_dataset(out).indexes
    first, fourth = indexes["train"][0], indexes["train"][3]
    expected = []
    for i in (0, 2):
        _flip(out / first.tar, first.columns.offset[i] + 600)
        expected.append(f"{first.tar}, sample {first.columns.key[i]}: bytes differ")
    os.truncate(out / indexes["train"][1].tar, 700)
    expected.append("train-000001.tar: is truncated")
    (out / "train-000002.tar.index.json").unlink()
    expected.append("train-000002.tar.index.json: is missing")
    _flip(out / fourth.tar, -1)  # the end-of-archive blocks belong to no sample
    expected.append("train-000003.tar: bytes between the samples")
    os.truncate(out / "test-000000.tar", 0)
    expected.append("test-000000.tar: is truncated")
    with pytest.raises(UserErrors) as caught:
        shards.verify(out)
    lines = [str(error) for error in caught.value.errors]
    assert len(lines) == len(expected)
    assert all(want in line for want, line in zip(expected, lines, strict=True))


def test_verify_finds_exchanged_shards(corpus):
    """Tar and index of another corpus, consistent between themselves."""
    corpus.good(8)
    ours = corpus.make("ours", samples_per_shard=100)
    corpus.rows = [row | {"label": -row["label"]} for row in corpus.rows]
    theirs = corpus.make("theirs", samples_per_shard=100)
    for name in ("train-000000.tar", "train-000000.tar.index.json"):
        (ours / name).write_bytes((theirs / name).read_bytes())
    with pytest.raises(UserErrors, match="is the index of another tar"):
        shards.verify(ours)
    record = json.loads((ours / "dataset.json").read_text())
    record["splits"]["train"]["shards"] = json.loads((theirs / "dataset.json").read_text())["splits"]["train"]["shards"]
    (ours / "dataset.json").write_text(json.dumps(record))
    with pytest.raises(UserErrors, match="content_hash differs"):
        shards.verify(ours)


@pytest.mark.parametrize("command", [lambda path: shards.inspect(path, as_json=False), shards.verify])
def test_not_a_shard_directory(tmp_path, command):
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UserError, match="is not a shard directory"):
            command(path)


def test_streamed_wav_of_unknown_size(corpus):
    """What ffmpeg writes into a pipe: the data chunk says 0xFFFFFFFF."""
    buffer = io.BytesIO()
    soundfile.write(buffer, corpus.rng.uniform(-1, 1, 4000), 16000, format="WAV", subtype="PCM_16")
    data = bytearray(buffer.getvalue())
    data[40:44] = b"\xff\xff\xff\xff"
    (corpus.folder / "pipe.wav").write_bytes(data)
    corpus.add("a", audio="pipe.wav")
    assert len(ShardedSplit(corpus.make(), "train")[0]["audio"]) == 4000


@pytest.mark.skipif(not EMODB.is_dir(), reason="the EmoDB recordings are not beside the checkout")
def test_emodb(corpus):
    files = sorted(EMODB.resolve().glob("*.flac"))
    for i, path in enumerate(files):
        corpus.add(path.stem, 0, ("train", "valid", "test")[i % 3], audio=str(path), text="Der Lappen")
    out = corpus.make(workers=2)
    shards.verify(out)
    keys: dict[str, np.ndarray] = {}
    for split in ("train", "valid", "test"):
        part = ShardedSplit(out, split)
        keys |= {part.keys[i]: part[i]["audio"] for i in range(len(part))}
    for path in files:
        assert np.array_equal(keys[path.stem], soundfile.read(path, dtype="float32")[0])
