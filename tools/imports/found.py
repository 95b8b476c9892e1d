"""What an importer finds: rows for the one pipeline, and an account of everything that did not become one."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sharding.errors import UserError
from sharding.shards import LONGEST_KEY, Split
from tools.imports.frames import film_of
from tools.manifest import LONGEST_TEXT, Manifest, Row, check_key, check_label, encodes, long_texts
from tools.sources import Features, Media

MOST_KEPT = 256  # numbers of an annotation that go into KEY.json
MOST_DEPTH = 2  # of lists and dicts in them


@dataclass(frozen=True)
class Options:
    """What the user says of a source; names of what in it is what. None: found by convention."""

    audio: str | None = None
    text: str | None = None
    vision: str | None = None
    transcript: str | None = None
    label: str | None = None
    labels: dict[str, float] | None = None  # numbers of classes
    splits: dict[Split, str] | None = None  # names that the source's splits have
    split_from: Path | None = None


@dataclass
class Found:
    """Collects the clips of a source; see `table` for what comes out.

    Args:
        kind: of importer.
        source: path of the corpus.
        label_range: smallest and largest label allowed.
        options: what the user said.
        classes: names, where labels are classes.
    """

    kind: str
    source: Path
    label_range: tuple[float, float]
    options: Options
    classes: tuple[str, ...] = ()
    rows: list[Row] = field(default_factory=list)
    problems: list[tuple[str, UserError]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    absent: dict[str, list[str]] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)  # key → first name that got it
    _too_large: Counter[str] = field(default_factory=Counter)  # annotations
    _came_from: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(
        self,
        name: str,
        label: Any,
        split: Split,
        came_from: str,
        *,
        audio: Path | Media | Features | None = None,
        text: str | None = None,
        text_features: Features | None = None,
        vision: Features | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Take a clip, or keep what is wrong with it.

        Args:
            name: of the clip in the source. What a shard cannot name becomes "_", and the name goes into KEY.json.
            label: a number, one of `classes`, or a class that `options.labels` gives a number.
            split: ours.
            came_from: the source's name of the split.
            text: transcript.
            extra: annotations for KEY.json; what JSON cannot hold is left out.
        """
        self._came_from[split, came_from] += 1
        key = safe_key(name)
        problems = check_key(key)
        if key in self._names:
            first = self._names[key]
            twice = f"stands twice in {self.source.name}" if first == name else f"gets the key of {first!r}"
            problems.append((twice, "Name each clip once"))
        self._names.setdefault(key, name)
        value, wrong = check_label(self._number(label), self.label_range, self.classes)
        problems += wrong
        text = (text or "").strip() or None
        if text and not encodes(text):
            problems.append(("text holds half a surrogate pair", "Write the whole character"))
        if text and len(text) > LONGEST_TEXT:
            problems.append((f"text of {len(text)} characters", f"Write at most {LONGEST_TEXT}"))
        if all(one is None for one in (audio, text, text_features, vision)):
            problems.append(("has no modality at all", "Give its files, or set it aside"))
        if problems:
            for problem in problems:
                self.problem(name, *problem)
            return
        for modality, one in {"audio": audio, "text": text or text_features, "vision": vision}.items():
            if one is None:
                self.absent.setdefault(modality, []).append(key)
        kept = {}
        for annotation, held in (extra or {}).items():
            kept[str(annotation)] = plain_value(held)
            self._too_large[str(annotation)] += kept[str(annotation)] is None and held is not None
        if key != name:
            self.renamed[key] = name
            kept = {"name": name, **kept}
        kept = {name: value for name, value in kept.items() if value is not None}
        self.rows.append(Row(key, value, split, audio, text, text_features, vision, extra=kept))

    def problem(self, name: str, problem: str, remedy: str) -> None:
        """A clip that is damaged: it stops the import, or is set aside."""
        self.problems.append((safe_key(name), UserError(f"{self.source}, clip {name}", problem, remedy)))

    def leave_out(self, name: str, reason: str) -> None:
        """Something in the source that is no clip of the corpus; counted and listed, no error."""
        self.left_out.append({"name": name, "reason": reason})

    def remark(self, text: str) -> None:
        """A line of the summary."""
        self.remarks.append(text)

    def _number(self, label: Any) -> Any:
        """A class by its number; anything else, and a name of one of `classes`, as it is."""
        numbers = self.options.labels
        label = label.item() if isinstance(label, np.generic) else label
        if not isinstance(label, str | int | float):
            return type(label).__name__  # not its text: a few bytes of a hostile file may stand for endless nesting
        if numbers is None or (str(label) in self.classes and str(label) not in numbers):
            return label
        return numbers.get(str(label), f"{label} (not in --labels)")

    def table(self, *, pictures: bool) -> Manifest:
        """The rows with remarks, problems, and the record for import.json.

        Args:
            pictures: whether those of films become vision; a clip with a film then does not lack it.

        Raises:
            UserError: there is no clip.
        """
        if not self.rows and not self.problems:
            raise UserError(str(self.source), "has no clips", "Name another source, or see docs/importers.md")
        splits = [
            {"split": split, "from": name, "clips": count} for (split, name), count in sorted(self._came_from.items())
        ]
        told = [f"{one['clips']} {one['split']} from {one['from']}" for one in splits]
        remarks = [f"Clips found: {', '.join(told)}"]
        filmed = {row.key for row in self.rows if pictures and film_of(row) is not None}
        absent = {
            modality: left
            for modality, keys in self.absent.items()
            if (left := [key for key in keys if modality != "vision" or key not in filmed])
        }
        for modality, keys in absent.items():
            remarks.append(f"{len(keys)} clips have no {modality} in the source, e.g. {keys[0]}")
        for reason, count in Counter(one["reason"] for one in self.left_out).items():
            remarks.append(f"{count} left out: {reason}")
        for name, count in self._too_large.items():
            if count:
                remarks.append(f"{count} clips: annotation {name!r} is too large or deep for KEY.json and left out")
        if self.renamed:
            remarks.append(
                f"{len(self.renamed)} names hold what a shard cannot name; the original is `name` in KEY.json"
            )
        record = {
            "kind": self.kind,
            "source": str(self.source),
            "options": {name: plain_value(value) for name, value in vars(self.options).items() if value is not None},
            "splits": splits,
            "remarks": [*remarks, *self.remarks],
            "left_out": self.left_out,
            "without": absent,
            "renamed": self.renamed,
        }
        remarks += self.remarks
        if self.left_out or absent:
            remarks.append("All of them by name: import.json beside the shards")
        return Manifest(self.rows, long_texts(self.rows), remarks, self.problems, record)


def safe_key(name: str) -> str:
    """A name with "_" for what a shard cannot name: ".", "/" and what does not print."""
    return "".join("_" if c in "./" or not c.isprintable() else c for c in name.strip())[: LONGEST_KEY + 1]


def plain_value(value: Any, depth: int = 0) -> Any:
    """A value as JSON holds it; None for what is too large, too deep, or of a kind that JSON does not have."""
    if isinstance(value, np.ndarray):
        value = value.tolist() if value.size <= MOST_KEPT and value.dtype.kind != "O" else None
    value = value.item() if isinstance(value, np.generic) else value
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str | Path):
        return str(value) if encodes(str(value)) and len(str(value)) <= LONGEST_TEXT else None
    if isinstance(value, list | tuple | dict):
        if len(value) > MOST_KEPT or depth == MOST_DEPTH:
            value = None
        elif isinstance(value, dict):
            value = {str(key): plain_value(one, depth + 1) for key, one in value.items()}
        else:
            value = [plain_value(one, depth + 1) for one in value]
        return value
    return value if isinstance(value, bool | int | float | None) else None
