"""MELD: a CSV per split, and a sound or film file per utterance.

Source: github declare-lab/MELD. train_sent_emo.csv, dev_sent_emo.csv, test_sent_emo.csv with Dialogue_ID, Utterance_ID,
Utterance, Sentiment, Emotion; files diaX_uttY.mp4 (or .wav) below a folder whose name begins with the split's.
Dialogues are numbered anew in each split.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from sharding.errors import UserError
from sharding.shards import Split
from tools.imports.found import Found
from tools.imports.splits import our_split
from tools.imports.tables import choose, media_below, read_table, refuse_classes
from tools.progress import tracked

COLUMNS = ("Dialogue_ID", "Utterance_ID", "Utterance")
NAME = re.compile(r"dia(\d+)_utt(\d+)")
# Where the published archive has the files of each split, beside folders called as the split.
FOLDERS = {"output_repeated_splits_test": "test"}


def read(found: Found, films: bool) -> None:
    """Adds the utterances of all splits.

    Args:
        films: whether films are preferred to sound files.

    Raises:
        UserError, UserErrors: no tables, columns missing, or classes without numbers.
    """
    source = found.source
    column = found.options.label or "Sentiment"
    tables = {
        path: split for path in sorted(source.rglob("*_sent_emo.csv")) if (split := _split_of(path.name)) is not None
    }
    if not tables:
        raise UserError(
            str(source), "holds no train_sent_emo.csv, dev_sent_emo.csv or test_sent_emo.csv", "Name MELD's folder"
        )
    twice = [split for split in set(tables.values()) if list(tables.values()).count(split) > 1]
    if twice:
        told = ", ".join(str(path) for path, split in tables.items() if split in twice)
        raise UserError(str(source), f"holds several tables of a split ({told})", "Move all but one of each away")
    rows = [(path, row) for path in tables for row in read_table(path, (*COLUMNS, column))]
    if found.options.labels is None and not found.classes:
        refuse_classes([row[column] for _, row in rows], f"{source}, column {column}")
    files = _files(found)
    if not files:
        raise UserError(
            str(source), "holds no file diaX_uttY below a folder of a split", "Put the sound or film files there"
        )
    for path, row in tracked(rows, "utterances"):
        split = tables[path]
        number = f"dia{row['Dialogue_ID'].strip()}_utt{row['Utterance_ID'].strip()}"
        found.add(
            f"{split}_{number}",
            row[column].strip(),
            split,
            path.name,
            audio=choose(files.pop((split, number), []), films),
            text=row["Utterance"],
            extra={name: value for name, value in row.items() if name != "Utterance"},
        )
    for left in files.values():
        for file in left:
            found.leave_out(str(file.relative_to(source)), "media without a row in the tables")


def _split_of(name: str) -> Split | None:
    return our_split(re.split(r"[_.\W]", name)[0])


def _files(found: Found) -> dict[tuple[Split, str], list[Path]]:
    """Files by split and utterance."""
    files: dict[tuple[Split, str], list[Path]] = defaultdict(list)
    for path in media_below(found.source):
        parents = path.relative_to(found.source).parts[:-1]
        splits = {split for part in parents if (split := _split_of(FOLDERS.get(part, part))) is not None}
        match = NAME.fullmatch(path.stem)
        if match is None or len(splits) != 1:
            reason = "media not called diaX_uttY" if match is None else "media below no folder of one split"
            found.leave_out(str(path.relative_to(found.source)), reason)
            continue
        files[splits.pop(), f"dia{int(match[1])}_utt{int(match[2])}"].append(path)
    return dict(files)
