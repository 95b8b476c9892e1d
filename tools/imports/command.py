"""`dist-train shards make --from KIND SOURCE OUT`: what is found becomes rows of the one pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import get_args

from sharding.errors import UserError, UserErrors, collected
from sharding.shard_writer import refuse_existing
from sharding.shards import SPLITS, Split
from tools import shards
from tools.imports import chsims, csd, datasets_folder, meld, merbench, mmsa
from tools.imports.found import Found, Options
from tools.imports.frames import FrameEncoder, with_frames

# Kinds, and the options that each understands.
KINDS: dict[str, set[str]] = {
    "merbench": {"audio", "text", "vision", "transcript", "label", "labels", "splits", "split_from"},
    "mmsa": {"label", "splits"},
    "csd": {"audio", "text", "vision", "transcript", "label", "split_from"},
    "meld": {"label", "labels"},
    "chsims": {"label", "splits"},
    "datasets": {"audio", "text", "vision", "transcript", "label", "labels", "splits", "split_from"},
}


def import_corpus(
    kind: str, source: Path, out: Path, options: Options, making: shards.Making, encoder: FrameEncoder | None
) -> None:
    """Build shards from a published corpus.

    Args:
        kind: of KINDS.
        source: file or folder.
        out: new directory.
        options: names of what in the source is what.
        making: how shards are made.
        encoder: of the frames of films.

    Raises:
        UserError, UserErrors: unusable options or source, bad samples, or the disk; then `out` does not exist.
    """
    check_kind(kind)
    given = {field.name for field in fields(options) if getattr(options, field.name) is not None}
    foreign = sorted(given - KINDS[kind])
    if foreign:
        told = ", ".join(_option(name) for name in sorted(KINDS[kind]))
        raise UserErrors(
            [UserError(_option(name), f"has no meaning with --from {kind}", f"It knows {told}") for name in foreign]
        )
    refuse_existing(out)  # before minutes of work
    if not source.exists():
        raise UserError(str(source), "is missing", "Correct the path")
    source = source.absolute()
    found = Found(kind, source, making.label_range, options, making.classes)
    films = encoder is not None
    errors: list[UserError] = []
    with collected(errors):
        match kind:
            case "merbench":
                merbench.read(found)
            case "mmsa":
                mmsa.read(found)
            case "csd":
                csd.read(found)
            case "meld":
                meld.read(found, films)
            case "chsims":
                chsims.read(found, films)
            case "datasets":
                datasets_folder.read(found)
    if errors:
        raise UserErrors(errors)
    shards.write(with_frames(found.table(pictures=encoder is not None), encoder), out, making, str(source))


def check_kind(kind: str) -> None:
    """Raise UserError where there is no such kind."""
    if kind not in KINDS:
        near = get_close_matches(kind.lower().replace("-", ""), KINDS, n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"Write one of {', '.join(KINDS)}"
        raise UserError("--from", f"{kind!r} is not known", remedy)


def read_classes(text: str | None) -> tuple[str, ...]:
    """Names of classes, in the order of their numbers: "angry,happy,neutral,sad"."""
    return () if text is None else tuple(name.strip() for name in text.split(","))


def read_labels(text: str | None, classes: Sequence[str] = ()) -> dict[str, float] | None:
    """Numbers of classes: "positive=1,neutral=0"; with names of classes also those: "exc=happy,hap=happy".

    Raises:
        UserError: it is not of that form.
    """
    if text is None:
        return None
    labels = {}
    for name, number in _pairs(text, "--labels", "positive=1,neutral=0,negative=-1").items():
        try:
            labels[name] = float(classes.index(number) if number in classes else number)
        except ValueError:
            remedy = f"Write CLASS=NUMBER,CLASS=NUMBER{', or CLASS=NAME with a name of --classes' if classes else ''}"
            raise UserError("--labels", f"{number!r} is not a number", remedy) from None
    return labels


def read_splits(text: str | None) -> dict[Split, str] | None:
    """Names of the source's splits by ours: "train=a,valid=b,test=c".

    Raises:
        UserError: it is not of that form.
    """
    if text is None:
        return None
    pairs = _pairs(text, "--splits", "train=train.clean,valid=dev,test=test2")
    unknown = sorted(set(pairs) - set(SPLITS))
    if unknown:
        raise UserError("--splits", f"{unknown[0]!r} is no split", f"Write {', '.join(SPLITS)} before the =")
    if len(set(pairs.values())) < len(pairs):
        raise UserError("--splits", "gives one split two names", "The same clips may not train and test")
    return {split: pairs[split] for split in get_args(Split) if split in pairs}


def _pairs(text: str, option: str, example: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",")]
    found = {name.strip(): value.strip() for name, _, value in pairs}
    if not all(name.strip() and sign and value.strip() for name, sign, value in pairs) or len(found) < len(pairs):
        raise UserError(option, f"{text!r} is no list of names and values", f"Write it like {example}")
    return found


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
