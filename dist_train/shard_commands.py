"""The commands `dist-train shards …`. Code is imported when a command is called."""

# ruff: noqa: PLC0415

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from sharding.errors import UserError

BAD_SAMPLE_HELP = "stop, or set_aside: leave bad samples out and count them."
OUT = typer.Argument(help="Directory to make.")
WORKERS = typer.Option(min=1, help="Processes.")
CORPUS, NAMES, FILMS = "Corpora (--from)", "What in SOURCE is what (--from)", "Films"
MAKE_HELP = """Build shards from a manifest, or with --from KIND from a published corpus as it is.

KIND and SOURCE:

merbench: folder with the label .npz (or that file); --audio, --text, --vision name
folders of .npy beside it or in features/.

mmsa: a feature pickle such as unaligned_50.pkl.

csd: folder of CMU-MultimodalSDK's .csd files, with --split-from.

meld: folder of *_sent_emo.csv and diaX_uttY files, with --labels or --classes.

chsims: folder of label.csv and Raw/VIDEO/CLIP.mp4.

datasets: folder written by Hugging Face datasets' save_to_disk.

Nothing is changed without a word: labels keep their scale, what is left out is counted and listed in OUT/import.json.
"""

shards = typer.Typer(no_args_is_help=True, help="Make, look at and verify WebDataset shards.")


@shards.command("make", help=MAKE_HELP)
def shards_make(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="CSV or JSONL manifest: key, audio, text, vision, label, split. Or a corpus."
        ),
    ],
    out: Annotated[Path, OUT],
    workers: Annotated[int, WORKERS] = os.cpu_count() or 1,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Samples per tar.")] = 1000,
    on_bad_sample: Annotated[str, typer.Option(help=BAD_SAMPLE_HELP)] = "stop",
    label_range: Annotated[tuple[float, float], typer.Option(help="Smallest and largest label.")] = (-3.0, 3.0),
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…", help="Labels are these classes (task: classification), stored as their places from 0."
        ),
    ] = None,
    fill_non_finite: Annotated[
        bool, typer.Option("--fill-non-finite", help="Write 0 where features are NaN or infinite, and count it.")
    ] = False,
    kind: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="KIND", help="merbench, mmsa, csd, meld, chsims, datasets.", rich_help_panel=CORPUS
        ),
    ] = None,
    splits: Annotated[
        str | None,
        typer.Option(
            metavar="OURS=THEIRS,…",
            help="Names of its splits, e.g. train=train,valid=dev,test=test2.",
            rich_help_panel=CORPUS,
        ),
    ] = None,
    split_from: Annotated[
        Path | None,
        typer.Option(
            help="JSON of names by split, CSV with name and split, or the SDK's fold file.", rich_help_panel=CORPUS
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="CLASS=NUMBER,…",
            help="Numbers of classes, e.g. positive=1,neutral=0,negative=-1; with --classes names too: exc=happy.",
            rich_help_panel=CORPUS,
        ),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Field, column or sequence of the label.", rich_help_panel=NAMES)
    ] = None,
    audio: Annotated[
        str | None, typer.Option(help="Folder, column or sequence of the audio.", rich_help_panel=NAMES)
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Folder, column or sequence of text features.", rich_help_panel=NAMES)
    ] = None,
    vision: Annotated[
        str | None, typer.Option(help="Folder, column or sequence of vision features.", rich_help_panel=NAMES)
    ] = None,
    transcript: Annotated[
        str | None, typer.Option(help="CSV, column or sequence of the words.", rich_help_panel=NAMES)
    ] = None,
    vision_encoder: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Image encoder of transformers: frames of films become vision.", rich_help_panel=FILMS
        ),
    ] = None,
    frames_per_second: Annotated[
        float | None, typer.Option(help="How many frames the encoder sees.", rich_help_panel=FILMS)
    ] = None,
) -> None:
    from tools.imports.command import check_kind, import_corpus, read_classes, read_labels, read_splits
    from tools.imports.found import Options
    from tools.imports.frames import load_encoder
    from tools.shards import Making, make

    if on_bad_sample not in ("stop", "set_aside"):
        raise UserError("--on-bad-sample", f"is {on_bad_sample!r}", "Write stop or set_aside.")
    if classes is not None and label_range != (-3.0, 3.0):
        raise UserError("--label-range", "has no meaning with --classes", "Leave one of them out.")
    named = read_classes(classes)
    making = Making(workers, samples_per_shard, on_bad_sample, label_range, fill_non_finite, named)
    options = Options(
        audio=audio,
        text=text,
        vision=vision,
        transcript=transcript,
        label=label,
        labels=read_labels(labels, named),
        splits=read_splits(splits),
        split_from=split_from,
    )
    if kind is None and options != Options():
        raise UserError("--from", "is missing: the options that name parts of a corpus need it", "Write --from KIND.")
    if kind is not None:
        check_kind(kind)
    encoder = load_encoder(vision_encoder, frames_per_second)
    if kind is None:
        make(source, out, making, encoder=encoder)
    else:
        import_corpus(kind, source, out, options, making, encoder)


@shards.command("demo")
def shards_demo(
    out: Annotated[Path, OUT],
    clips: Annotated[int, typer.Option(min=20, help="Number of clips.")] = 2000,
    mean_seconds: Annotated[float, typer.Option(min=2, help="Mean length of a clip in seconds.")] = 2.5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the corpus.")] = 0,
    workers: Annotated[int, WORKERS] = os.cpu_count() or 1,
) -> None:
    """Generate the embedded corpus (spoken opinion sentences with faces) as shards."""
    from tools.demo_corpus import make_demo

    make_demo(out, clips=clips, seed=seed, workers=workers, mean_seconds=mean_seconds)


@shards.command("inspect")
def shards_inspect(
    directory: Annotated[Path, typer.Argument(help="Directory of shards.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show counts, lengths, labels, missing modalities and a few samples."""
    from tools.shards import inspect

    inspect(directory, as_json=as_json)


@shards.command("verify")
def shards_verify(directory: Annotated[Path, typer.Argument(help="Directory of shards.")]) -> None:
    """Check every checksum."""
    from tools.shards import verify

    verify(directory)
