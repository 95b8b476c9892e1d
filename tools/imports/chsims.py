"""CH-SIMS (and its second version): label.csv, and a film or sound file per clip.

Source: github thuiar/MMSA. label.csv (or meta.csv) with video_id, clip_id, text, label, label_T, label_A, label_V,
annotation, mode; files Raw/VIDEO_ID/CLIP_ID.mp4. Labels lie in [-1, 1].
"""

from __future__ import annotations

from pathlib import Path

from sharding.errors import UserError
from tools.imports.found import Found
from tools.imports.splits import match_splits
from tools.imports.tables import choose, media_below, read_table
from tools.progress import tracked

COLUMNS = ("video_id", "clip_id", "text", "mode")


def read(found: Found, films: bool) -> None:
    """Adds the clips of the table.

    Args:
        films: whether films are preferred to sound files.

    Raises:
        UserError, UserErrors: no table, or columns missing.
    """
    source = found.source
    table = next((source / name for name in ("label.csv", "meta.csv") if (source / name).is_file()), None)
    if table is None:
        raise UserError(str(source), "holds no label.csv or meta.csv", "Name CH-SIMS's folder")
    column = found.options.label or "label"
    rows = read_table(table, (*COLUMNS, column))
    splits = match_splits(sorted({row["mode"].strip() for row in rows}), found.options.splits, f"{table}, column mode")
    folder = next((source / name for name in ("Raw", "raw") if (source / name).is_dir()), source)
    files: dict[tuple[str, str], list[Path]] = {}
    for path in media_below(folder):
        files.setdefault((path.parent.name, _clip(path.stem)), []).append(path)
    if not files:
        raise UserError(str(folder), "holds no sound or film files", "Put them there: Raw/VIDEO_ID/CLIP_ID.mp4")
    for row in tracked(rows, "clips"):
        video, clip = row["video_id"].strip(), row["clip_id"].strip()
        name, mode = f"{video}_{clip}", row["mode"].strip()
        if mode not in splits:
            found.leave_out(name, f"mode {mode!r} is no split")
            continue
        found.add(
            name,
            row[column].strip(),
            splits[mode],
            mode,
            audio=choose(files.pop((video, _clip(clip)), []), films),
            text=row["text"],
            extra={key: value for key, value in row.items() if key not in ("text", column)},
        )
    for left in files.values():
        for file in left:
            found.leave_out(str(file.relative_to(source)), "media without a row in the table")
    labels = [row.label for row in found.rows]
    if labels and not found.classes and max(map(abs, labels)) <= 1 < found.label_range[1]:
        found.remark(f"Labels lie in [-1, 1], the range is {found.label_range}: --label-range -1 1 says what they are")


def _clip(name: str) -> str:
    """Spreadsheets take the zeros off 0001."""
    return name.lstrip("0") or "0"
