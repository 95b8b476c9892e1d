"""Manifests: good ones are read as they are, bad ones are reported whole, in one pass."""

import csv
import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sharding.errors import UserError, UserErrors
from tools.manifest import LONG_TEXT, MOST_ERRORS, read_manifest

HEADER = ["key", "audio", "text", "vision", "label", "split"]


def write_csv(path, rows, header=HEADER):
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows([header, *rows])
    path.write_text(buffer.getvalue(), encoding="utf-8", newline="")
    return path


def problems(path, **options):
    with pytest.raises((UserError, UserErrors)) as caught:
        read_manifest(path, **options)
    found = getattr(caught.value, "errors", [caught.value])
    assert all(error.where and error.remedy and "\n" not in str(error) for error in found)
    return [str(error) for error in found]


def test_csv_and_jsonl_say_the_same(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.wav", "b.FLAC", "sub/v.npy"):
        (tmp_path / name).touch()
    cells = [
        ["a", "a.wav", 'He said "no,\nnever"', "sub/v.npy", "-1.5", "train", "Ann"],
        ["b", str(tmp_path / "b.FLAC"), "", "", "3", "valid", ""],
        ["ü 1", "", " grün ", "", "+0e3", "test", "7"],
    ]
    header = [*HEADER, "speaker"]
    rows = [dict(zip(header, row, strict=True)) for row in cells]
    (tmp_path / "m.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    table = read_manifest(write_csv(tmp_path / "m.csv", cells, header))
    assert table == read_manifest(tmp_path / "m.jsonl") and table.notes == []
    a, b, c = table.rows
    assert (a.key, a.label, a.split, a.text) == ("a", -1.5, "train", 'He said "no,\nnever"')
    assert (a.audio, a.vision, a.text_features) == (tmp_path / "a.wav", tmp_path / "sub/v.npy", None)
    assert (b.audio, b.text, b.vision, b.label) == (tmp_path / "b.FLAC", None, None, 3.0)
    assert (c.key, c.text, c.extra) == ("ü 1", "grün", {"speaker": "7"})


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=30).filter(str.strip),
            st.floats(-3, 3),
        ),
        min_size=1,
        unique_by=lambda row: row[0],
    )
)
def test_any_text_survives_both_formats(tmp_path, rows):
    write_csv(
        tmp_path / "m.csv",
        [[key, text, label, "train"] for key, text, label in rows],
        ["key", "text", "label", "split"],
    )
    lines = [json.dumps({"key": key, "text": text, "label": label, "split": "train"}) for key, text, label in rows]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    for name in ("m.csv", "m.jsonl"):
        found = read_manifest(tmp_path / name).rows
        assert [(row.key, row.text, row.label) for row in found] == [(k, t.strip(), label) for k, t, label in rows]


def test_everything_wrong_is_reported_at_once(tmp_path):
    (tmp_path / "here.wav").touch()
    rows = [
        ["same", "here.wav", "", "", "0", "train"],
        ["same", "here.wav", "", "", "0", "train"],
        ["a.b/c", "here.wav", "", "", "0", "train"],
        ["bell\x07", "here.wav", "", "", "0", "train"],
        ["", "here.wav", "", "", "0", "train"],
        ["l1", "here.wav", "", "", "happy", "train"],
        ["l2", "here.wav", "", "", "nan", "train"],
        ["l3", "here.wav", "", "", "3.01", "train"],
        ["l4", "here.wav", "", "", "-inf", "train"],
        ["l5", "here.wav", "", "", "", "train"],
        ["s1", "here.wav", "", "", "0", "val"],
        ["s2", "here.wav", "", "", "0", "folds"],
        ["m1", "gone.wav", "", "gone.npy", "0", "train"],
        ["m2", "here.txt", "", "here.wav", "0", "train"],
        ["m3", "", " ", "", "0", "train"],
        ["many", "here.wav", "", "", "9", "dev", "too much"],
        ["two", "x" * 5000 + ".wav", "", "", "9", "train"],
    ]
    found = problems(write_csv(tmp_path / "m.csv", rows))
    for expected in [
        "m.csv:3: key 'same' stands on lines 2, 3",
        "m.csv:4 (a.b/c): key 'a.b/c' holds '.', '/'",
        r"m.csv:5: key 'bell\x07' holds '\x07'",
        "m.csv:6: key is empty",
        "m.csv:7 (l1): label 'happy' is not a number",
        "m.csv:8 (l2): label 'nan' is not a number",
        "m.csv:9 (l3): label 3.01 is outside -3 … 3",
        "m.csv:10 (l4): label -inf is outside",
        "m.csv:11 (l5): label '' is not a number",
        "m.csv:12 (s1): unknown split 'val'. Write 'valid'",
        "m.csv:13 (s2): unknown split 'folds'. Write one of train, valid, test",
        "m.csv:14 (m1): audio file",
        "m.csv:14 (m1): vision file",
        "m.csv:15 (m2): audio file",
        "m.csv:15 (m2): vision file",
        "m.csv:16 (m3): has no modality at all",
        "m.csv:17: 7 cells under 6 columns",
        "m.csv:18 (two): label 9 is outside",
        "m.csv:18 (two): audio file name cannot be used",
    ]:
        matching = [line for line in found if expected in line]
        assert len(matching) == 1, (expected, found)
        found.remove(matching[0])
    assert found == []


def test_label_range(tmp_path):
    path = write_csv(tmp_path / "m.csv", [["a", "", "x", "", "0.5", "train"], ["b", "", "x", "", "1.5", "train"]])
    assert [row.label for row in read_manifest(path).rows] == [0.5, 1.5]
    assert "label 1.5 is outside 0 … 1" in problems(path, label_range=(0, 1))[0]
    assert "is not below" in problems(path, label_range=(1, 1))[0]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (["key", "text", "label"], ["has no column 'split'"]),
        (["id", "text"], ["has no column 'key'", "has no column 'label'", "has no column 'split'"]),
        (["key", "label", "split", "video"], ["has none of the columns audio, text"]),
        (
            ["key;text;label;split"],
            ["no column 'key'", "no column 'label'", "no column 'split'", "none of the columns"],
        ),
        (["key", "text", "text", "label", "split"], ["column 'text' stands 2 times"]),
    ],
)
def test_columns(tmp_path, header, expected):
    row = {"key": "a", "text": "t", "label": "0", "split": "train"}
    found = problems(write_csv(tmp_path / "m.csv", [[row.get(name, "x") for name in header]], header))
    assert len(found) == len(expected)
    assert all(want in line for want, line in zip(expected, found, strict=True))


@pytest.mark.parametrize("content", ["", "key,text,label,split\n", "\n\n"])
def test_nothing_in_it(tmp_path, content):
    (tmp_path / "m.csv").write_text(content)
    assert problems(tmp_path / "m.csv")
    (tmp_path / "m.jsonl").write_text("")
    assert "has no rows" in problems(tmp_path / "m.jsonl")[0]


def test_invalid_utf8_names_every_line(tmp_path):
    lines = [b"key,text,label,split", b"a,gut,0,train", b"b,sch\xf6n,0,train", b"c,gut,0,train", b"d,\xc3,0,train"]
    (tmp_path / "m.csv").write_bytes(b"\n".join(lines))
    found = problems(tmp_path / "m.csv")
    assert len(found) == 2
    assert "m.csv:3: byte 6 of the line (0xf6) is not valid UTF-8" in found[0] and "m.csv:5" in found[1]


def test_byte_order_mark_is_no_column_name(tmp_path):
    (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbfkey,text,label,split\r\na,gut,0,train\r\n")
    assert read_manifest(tmp_path / "m.csv").rows[0].text == "gut"


def test_unclosed_quote(tmp_path):
    (tmp_path / "m.csv").write_text('key,text,label,split\na,"gut,0,train\n')
    assert "is not valid CSV" in problems(tmp_path / "m.csv")[0]


def test_jsonl_oddities(tmp_path):
    good = {"key": "a", "text": "t", "label": 0, "split": "train"}
    lines = [
        json.dumps(good),
        "{broken",
        "[1]",
        json.dumps(good | {"key": "b", "label": float("nan")}),
        json.dumps(good | {"key": "c", "label": True}),
        json.dumps(good | {"key": "d", "text": ["a", "list"]}),
        json.dumps(good | {"key": "e", "text": "\ud800"}),
        json.dumps(good | {"key": "\ud800"}),
        json.dumps(good | {"key": "f", "label": None}),
        json.dumps(good | {"key": "g", "label": 10**400}),
        json.dumps(good | {"key": "h", "audio": "a\0.wav"}),
        json.dumps({"key": "i", "text": "t", "split": "train"}),
        "[" * 100_000,
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    found = "\n".join(problems(tmp_path / "m.jsonl"))
    found.encode()
    for line in range(2, len(lines) + 1):
        assert f"m.jsonl:{line}:" in found or f"m.jsonl:{line} (" in found, line
    assert "m.jsonl:1" not in found.replace("m.jsonl:10", "").replace("m.jsonl:11", "").replace(
        "m.jsonl:12", ""
    ).replace("m.jsonl:13", "")
    (tmp_path / "m.jsonl").write_text(json.dumps(good | {"score": float("nan"), "tags": [1]}))
    assert read_manifest(tmp_path / "m.jsonl").rows[0].extra == {"score": "NaN", "tags": [1]}


def test_many_errors_are_counted_not_all_printed(tmp_path):
    found = problems(write_csv(tmp_path / "m.csv", [[f"k{i}", "", "t", "", "x", "train"] for i in range(200)]))
    assert len(found) == MOST_ERRORS + 1 and f"{200 - MOST_ERRORS} more" in found[-1]


def test_long_text_is_allowed_and_said(tmp_path):
    text = "word " * 40_000  # beyond the csv module's own limit of 131,072 characters
    table = read_manifest(write_csv(tmp_path / "m.csv", [["a", "", text, "", "0", "train"]]))
    assert table.rows[0].text == text.strip() and len(text) > LONG_TEXT
    assert len(table.notes) == 1 and table.notes[0].startswith("a: text of 199999 characters")


@pytest.mark.parametrize("name", ["gone.csv", "."])
def test_unreadable(tmp_path, name):
    assert "cannot be read" in problems(tmp_path / name)[0]


def test_feature_columns(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 3)))
    path = write_csv(
        tmp_path / "m.csv",
        [["a", "a.npy", "a.npy", "0", "train"]],
        ["key", "audio", "text_features", "label", "split"],
    )
    row = read_manifest(path).rows[0]
    assert row.audio == row.text_features == tmp_path / "a.npy" and row.text is None
