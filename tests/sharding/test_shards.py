"""The on-disk format: written deterministically, readable by webdataset, and every damage named."""

import hashlib
import io
import json
import os
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset

from sharding.errors import UserError, UserErrors
from sharding.shard_writer import pack_sample, write_dataset
from sharding.shards import Dims, load_dataset, load_info, read_sample
from tests.corpus import LABELS, forbidden_directory, random_sample, small_disk, write_corpus

DIMS = Dims(audio="waveform", text=7, simulated=7, vision=5)
KEYS = [f"clip_{i:03d}" for i in range(20)] + ["schöne Grüße", "k" * 150, "日本" * 60]


@pytest.fixture
def rng():
    return np.random.default_rng()


@pytest.fixture
def samples(rng):
    return [random_sample(rng, key) for key in KEYS]


@pytest.fixture
def corpus(tmp_path, samples):
    write_corpus(tmp_path / "out", samples, samples_per_shard=10)
    return tmp_path / "out"


def _same(found, sample):
    for name in ("audio", "text", "text_features", "simulated", "vision"):
        a, b = found[name], sample[name]
        assert (a is None) == (b is None), name
        if b is not None:
            assert a == b if isinstance(b, str) else (a.dtype == np.float32 and np.array_equal(a, b)), name


def _each(root):
    for index in load_dataset(root).indexes["train"]:
        fd = os.open(root / index.tar, os.O_RDONLY)
        for i, key in enumerate(index.columns.key):
            row = {name: getattr(index.columns, name)[i] for name in ("offset", "size", "sha256")}
            yield index, i, lambda fd=fd, key=key, row=row: read_sample(fd, "tar", DIMS, key=key, **row)
        os.close(fd)


def test_round_trip(corpus, samples):
    found = [(index.columns, i, read()) for index, i, read in _each(corpus)]
    assert [c.key[i] for c, i, _ in found] == KEYS
    for (columns, i, decoded), sample in zip(found, samples, strict=True):
        _same(decoded, sample)  # PCM16 audio and float32 arrays come back bit by bit
        row = {name: getattr(columns, name)[i] for name in type(columns).model_fields}
        assert row["label"] == sample["label"]
        assert row["audio_seconds"] == (None if sample["audio"] is None else len(sample["audio"]) / 16000)
        assert row["text_characters"] == (None if sample["text"] is None else len(sample["text"]))
        assert row["text_frames"] == (None if sample["text_features"] is None else len(sample["text_features"]))
        assert row["simulated_frames"] == (None if sample["simulated"] is None else len(sample["simulated"]))
        assert row["vision_frames"] == (None if sample["vision"] is None else len(sample["vision"]))


def test_dataset_json_counts_what_is_there(corpus, samples):
    info = load_info(corpus).splits["train"]
    labels = [sample["label"] for sample in samples]
    assert info.samples == len(samples) and [entry.samples for entry in info.shards] == [10, 10, 3]
    assert info.labels.median == pytest.approx(np.median(labels)) and sum(info.labels.counts) == len(labels)
    assert (info.labels.min, info.labels.max) == (min(labels), max(labels))
    assert info.seconds == pytest.approx(sum(len(s["audio"]) / 16000 for s in samples if s["audio"] is not None))
    assert info.missing == {
        "audio": sum(s["audio"] is None for s in samples),
        "text": sum(s["text"] is None and s["text_features"] is None for s in samples),
        "vision": sum(s["vision"] is None for s in samples),
    }


def test_plain_webdataset_reads_them(corpus, samples):
    urls = [str(path) for path in sorted(corpus.glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [one["__key__"] for one in found] == KEYS
    for one, sample in zip(found, samples, strict=True):
        record = json.loads(one["json"])
        assert (record["key"], record["label"], record["split"]) == (sample["key"], sample["label"], "train")
        assert (one["txt"].decode() if "txt" in one else None) == sample["text"]
        if sample["audio"] is not None:
            audio, rate = soundfile.read(io.BytesIO(one["wav"]), dtype="float32")
            assert rate == 16000 and np.array_equal(audio, sample["audio"])
        if sample["vision"] is not None:
            assert np.array_equal(np.load(io.BytesIO(one["vision.npy"])), sample["vision"])


def test_a_range_is_a_tar_on_its_own(corpus):
    for index in load_dataset(corpus).indexes["train"]:
        data = (corpus / index.tar).read_bytes()
        columns = index.columns
        for key, start, size in zip(columns.key, columns.offset, columns.size, strict=True):
            with tarfile.open(fileobj=io.BytesIO(data[start : start + size])) as tar:
                members = tar.getmembers()
            assert {member.name.split(".")[0] for member in members} == {key}
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}


def test_same_input_same_bytes_and_hash_without_layout(tmp_path, corpus, samples, rng):
    write_corpus(tmp_path / "again", samples, samples_per_shard=10)
    names = sorted(path.name for path in corpus.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((corpus / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)

    shuffled = [samples[i] for i in rng.permutation(len(samples))]
    write_corpus(tmp_path / "other", shuffled, samples_per_shard=3)
    assert load_info(tmp_path / "other").content_hash == load_info(corpus).content_hash
    lines = sorted(
        f"train\t{key}\t{sha}\n"
        for index in load_dataset(corpus).indexes["train"]
        for key, sha in zip(index.columns.key, index.columns.sha256, strict=True)
    )
    assert load_info(corpus).content_hash == hashlib.sha256("".join(lines).encode()).hexdigest()

    changed = [samples[0] | {"label": samples[0]["label"] / 2 + 0.1}, *samples[1:]]
    write_corpus(tmp_path / "changed", changed, samples_per_shard=10)
    assert load_info(tmp_path / "changed").content_hash != load_info(corpus).content_hash


def test_every_damaged_byte_of_a_sample_is_found(corpus, rng):
    index = load_dataset(corpus).indexes["train"][0]
    i = int(rng.integers(len(index.columns.key)))
    path = corpus / index.tar
    data = bytearray(path.read_bytes())
    data[index.columns.offset[i] + int(rng.integers(index.columns.size[i]))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    for n, (_, _, read) in enumerate(_each(corpus)):
        if n == i:
            with pytest.raises(UserError, match="checksum") as caught:
                read()
            assert index.columns.key[i] in str(caught.value)
        else:
            read()


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("wav", b"RIFF", "Error opening"),
        ("vision.npy", b"\x93NUMPY\x01\x00", "damaged .npy header"),
        ("vision.npy", "object", "pickled objects"),
        ("vision.npy", np.zeros(3, np.float32), "float32 array"),
        ("vision.npy", np.zeros((3, 5)), "float32 array"),
        ("vision.npy", np.zeros((3, 6), np.float32), "width 5"),
        ("txt", b"\xff", "utf-8"),
    ],
)
def test_sample_that_does_not_decode(tmp_path, name, content, problem):
    if not isinstance(content, bytes):
        buffer = io.BytesIO()
        array = np.array([{}], dtype=object) if isinstance(content, str) else content
        np.save(buffer, array, allow_pickle=True)
        content = buffer.getvalue()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo(f"k.{name}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    data = buffer.getvalue()[: 512 + -(-len(content) // 512) * 512]
    (tmp_path / "t.tar").write_bytes(data)
    fd = os.open(tmp_path / "t.tar", os.O_RDONLY)
    sha256 = hashlib.sha256(data).hexdigest()
    with pytest.raises(UserError, match=problem) as caught:
        read_sample(fd, "t.tar", DIMS, key="k", offset=0, size=len(data), sha256=sha256)
    assert "t.tar, sample k" in str(caught.value)
    with pytest.raises(UserError, match="not of this sample"):
        read_sample(fd, "t.tar", DIMS, key="other", offset=0, size=len(data), sha256=sha256)
    os.close(fd)


def _truncate(root: Path) -> None:
    os.truncate(root / "train-000001.tar", 5000)


def _lengthen(root: Path) -> None:
    with (root / "train-000001.tar").open("ab") as stream:
        stream.write(bytes(512))


def _swap_index(root: Path) -> None:
    (root / "train-000000.tar.index.json").replace(root / "train-000001.tar.index.json")
    (root / "train-000000.tar.index.json").write_bytes((root / "train-000001.tar.index.json").read_bytes())


def _edit(name: str, change):
    def edit(root: Path) -> None:
        record = json.loads((root / name).read_text())
        change(record)
        (root / name).write_text(json.dumps(record))

    return edit


INDEX = "train-000001.tar.index.json"


@pytest.mark.parametrize(
    ("damage", "where", "problem"),
    [
        (_truncate, "train-000001.tar", "is truncated"),
        (_lengthen, "train-000001.tar", "is not the tar of its index"),
        (_swap_index, INDEX, "is the index of another tar"),
        (lambda root: (root / INDEX).unlink(), INDEX, "is missing"),
        (lambda root: (root / "train-000001.tar").unlink(), "train-000001.tar", "is missing"),
        (lambda root: (root / INDEX).write_text('{"form'), INDEX, "is damaged"),
        (lambda root: (root / INDEX).write_bytes(b"\xff\xfe"), INDEX, "is damaged"),
        (lambda root: (root / INDEX).write_text("[" * 100_000), INDEX, "is damaged"),
        (_edit(INDEX, lambda r: r["columns"]["size"].pop()), INDEX, "do not fit together"),
        (_edit(INDEX, lambda r: r["columns"].update(offset=r["columns"]["offset"][::-1])), INDEX, "do not fit"),
        (_edit(INDEX, lambda r: r["columns"].update(label=["x"] * 10)), INDEX, "columns.label"),
        (_edit(INDEX, lambda r: r["columns"].update(key=["a"] * 10)), "out", "holds a key twice"),
        (_edit("dataset.json", lambda r: r.update(format="dist-train-shards/9")), "dataset.json", "has format"),
        (_edit("dataset.json", lambda r: r.pop("dims")), "dataset.json", "dims"),
        (_edit("dataset.json", lambda r: r.update(splits={})), "out", "has no shards"),
        (_edit("dataset.json", lambda r: r["splits"]["train"].update(shards=[])), "out", "has no shards"),
        (
            _edit("dataset.json", lambda r: r["splits"]["train"]["shards"][0].update(file="../train-000000.tar")),
            "dataset.json",
            "pattern",
        ),
        (lambda root: (root / "dataset.json").unlink(), "out", "is not a shard directory"),
    ],
)
def test_damaged_directory(corpus, damage, where, problem):
    damage(corpus)
    with pytest.raises(UserError, match=problem) as caught:
        load_dataset(corpus)
    assert where in caught.value.where and caught.value.remedy
    assert "\n" not in str(caught.value)


def test_all_bad_tars_are_named(corpus):
    _truncate(corpus)
    (corpus / "train-000000.tar.index.json").unlink()
    with pytest.raises(UserErrors) as caught:
        load_dataset(corpus, "train")
    assert [Path(error.where).name for error in caught.value.errors] == [
        "train-000000.tar.index.json",
        "train-000001.tar",
    ]


def test_unknown_split(corpus):
    with pytest.raises(UserError, match=r"has no split 'dev'.*train"):
        load_dataset(corpus, "dev")


def _nothing_left(folder: Path) -> None:
    assert list(folder.iterdir()) == []


def test_existing_directory_is_kept(tmp_path, samples):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(UserError, match="exists"):
        write_corpus(tmp_path / "out", samples, 10)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_disk_full(tmp_path, rng):
    samples = [random_sample(rng, f"k{i}") | {"audio": rng.uniform(-1, 1, 50_000)} for i in range(8)]
    with small_disk(tmp_path / "disk", 400_000) as disk:
        with pytest.raises(UserError, match="disk full") as caught:
            write_corpus(disk / "new" / "out", samples, 100)
        _nothing_left(disk)
    assert str(disk / "new" / "out") in caught.value.where and "\n" not in str(caught.value)


def test_disk_full_at_the_last_byte(tmp_path):
    """What the operating system has buffered can also fail on close."""
    sample = {"key": "k", "label": 0.0, "audio": np.zeros(16_000, np.float32)}
    with small_disk(tmp_path / "disk", 32_768) as disk:
        with pytest.raises(UserError, match="disk full"):
            write_corpus(disk / "out", [sample], 100)
        _nothing_left(disk)


def test_no_write_permission(tmp_path, samples):
    with forbidden_directory(tmp_path / "forbidden") as folder:
        with pytest.raises(UserError, match="no write permission"):
            write_corpus(folder / "out", samples, 10)
        _nothing_left(folder)


def test_a_file_in_the_way(tmp_path, samples):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        write_corpus(tmp_path / "file" / "out", samples, 10)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_stays_after_an_interruption(tmp_path, samples, error):
    expected = (UserError, "interrupted") if error is KeyboardInterrupt else (RuntimeError, "^ours$")

    def interrupted():
        with write_dataset(tmp_path / "a" / "out", dims=DIMS, label_range=LABELS, samples_per_shard=4) as writer:
            for sample in samples:
                writer.add("train", pack_sample(split="train", **sample))
            if error is KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)
            raise RuntimeError("ours")

    with pytest.raises(expected[0], match=expected[1]):
        interrupted()
    _nothing_left(tmp_path)
