"""Hostile run directories: what `report` reads and writes, and what --resume and `evaluate` would write into."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.security.attempt import Words
from tests.security.case import Case

SCRIPT = "<script>alert(1)</script>"
TEX = "$\\frac{$"
STEP = {"kind": "step", "step": 1, "loss": 1.0, "step_seconds": 1.0, "samples": 4}


def run(name: str, content: Any, command: str = "report") -> Callable[[Path], Words]:
    """A run directory with one entry changed: text, JSON, or a function that makes the path."""

    def lay(folder: Path) -> Words:
        place = folder / "run"
        place.mkdir()
        for other, record in {"metrics.jsonl": STEP, "recipe.yaml": {"seed": 1}, "summary.json": {"seed": 1}}.items():
            if other != name:
                (place / other).write_text(json.dumps(record) + "\n")
        if callable(content):
            content(place / name)
        else:
            (place / name).write_text(content if isinstance(content, str) else json.dumps(content))
        words: dict[str, Words] = {
            "report": ["report", "run"],
            "evaluate": ["evaluate", "run"],
            "train": ["train", "run/recipe.yaml", "--output", "run", "--resume"],
        }
        return words[command]

    return lay


def outside(path: Path) -> None:
    """A link to a file or directory beside the run directory."""
    place = path.parent.parent / "elsewhere"
    place.mkdir()
    (place / "victim").write_text("precious")
    path.symlink_to(place if path.suffix == "" else place / "victim")


def tree(depth: int) -> str:
    return '{"a": ' * depth + "1" + "}" * depth


def representations(shape: tuple[int, int], size: float = 0.0, **more: np.ndarray) -> Callable[[Path], None]:
    """Few bytes whose distances to each other are many, or numbers up to `size`."""
    values = np.linspace(-size, size, int(np.prod(shape))).reshape(shape).astype(np.float64 if size else np.float32)
    tensors = {**dict.fromkeys(("complete", "missing"), values), **more}
    return lambda path: save_file({**tensors, "label": np.linspace(0, 1, shape[0], dtype=np.float32)}, path)


def attention(layers: int, targets: list[int], frames: int = 2) -> Callable[[Path], None]:
    """Weights of a clip that is shown, each row of which sums to 1."""

    def write(path: Path) -> None:
        (path.parent / "predictions_test.csv").write_text(CLIP)
        weights = np.full((layers, len(targets), frames), 1 / frames, np.float16)
        tensors = {"targets": np.array(targets), "frame_seconds": np.array([0.02]), f"clip/{SCRIPT}": weights}
        save_file(tensors, path)

    return write


def terabyte(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


LAUGHS = "a: &a0 [x, x]\n" + "".join(f"b{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
LINK = r"run/{}: is a link that leads out of the run directory\. Put"
LEFT_OUT = r"{} is damaged and was left out"

WILD, TEXT = np.linspace(-1e300, 1e300, 300).reshape(20, 3, 5), np.ones(20, np.float32)
LONG = "representations_test.safetensors"
ATTENDS = "attention_test.safetensors"
SHOWN = ("selected_on", "seed", "selected_flow", "best_step")
LOUD: dict[str, Any] = {**dict.fromkeys(SHOWN, SCRIPT), "notes": [SCRIPT], "test": {"complete": {"mae": 1}}}
MEASURED = {"step": 1, "peak_bytes": 9, "foretold_peak_bytes": 9, "foretold_peak_parts": {TEX: 9}}
EVAL = {"kind": "eval", "step": 1, "split": '" onload="x', "complete": {"mae": 1}, "missing": {"mae": 1}}
SLOW = {"speed": {"phase_seconds": {TEX: 9}}}
CLIP = f'key,label,complete,missing,imagined\n"{SCRIPT}",1,2,3,"{SCRIPT}{TEX}"\n'
NAMED = [f"{flow}:{name}" for flow in ("complete", "missing") for name in (SCRIPT, "b")]
CLASSES = f"key,label,complete,missing,{','.join(NAMED)}\na,1,0,1,0.5,0.5,0.25,0.75\n"
TERMS = {f"loss/{i}": 1.0 for i in range(10_000)}


def metrics(**fields: Any) -> Callable[[Path], Words]:
    """Step records with more in them."""
    return run("metrics.jsonl", {**STEP, **fields})


# fmt: off
CASES = [
    Case("report.html that links to a file outside", run("report.html", outside), (LINK.format("report.html"),)),
    Case("figures that link to a directory outside", run("figures", outside), (LINK.format("figures"),)),
    Case("logs that link outside", run("logs", outside, "evaluate"), (LINK.format("logs"),)),
    Case("tokenizer that links outside", run("tokenizer", outside, "train"), (LINK.format("tokenizer"),)),
    Case("predictions that link outside", run("predictions_test.csv", outside, "evaluate"),
         (LINK.format("predictions_test.csv"),)),
    Case("script in a summary", run("summary.json", LOUD), page=("&lt;script&gt;",)),
    Case("script in keys of a recipe", run("recipe.yaml", {SCRIPT: {SCRIPT: SCRIPT}}), page=("&lt;script&gt;",)),
    Case("script in keys of the environment", run("environment.json", {SCRIPT: SCRIPT}), page=("&lt;script&gt;",)),
    Case("script in names of loss terms", metrics(**{f"loss/{SCRIPT}": 1.0}), page=("Loss terms",)),
    Case("attribute that ends early", run("metrics.jsonl", EVAL), page=("No evaluation|onload=&#34;x|onload",)),
    Case("TeX that does not end, in a loss term", metrics(**{f"loss/{TEX}": 1.0}), page=("Loss terms",)),
    Case("TeX that does not end, in parts of memory", run("plan.json", {"measured": MEASURED}), page=("foretold",)),
    Case("TeX that does not end, in phases", run("summary.json", SLOW), page=("time goes",)),
    Case("recipe of a billion laughs", run("recipe.yaml", LAUGHS), page=(LEFT_OUT.format("recipe.yaml"),)),
    Case("recipe with a tag", run("recipe.yaml", "!!python/object/apply:os.mkdir [ran]\n"),
         page=(LEFT_OUT.format("recipe.yaml"),)),
    Case("recipe nested deeply", run("recipe.yaml", "[" * 100_000), page=(LEFT_OUT.format("recipe.yaml"),)),
    Case("environment nested deeply", run("environment.json", tree(900)), page=(LEFT_OUT.format("environment.json"),)),
    Case("summary nested a million deep", run("summary.json", tree(10**6)), page=(LEFT_OUT.format("summary.json"),)),
    Case("summary of a terabyte", run("summary.json", terabyte), page=(LEFT_OUT.format("summary.json"),)),
    Case("metrics that are a FIFO", run("metrics.jsonl", os.mkfifo), page=("metrics.jsonl is absent or unreadable",)),
    Case("metrics of a terabyte", run("metrics.jsonl", terabyte), page=("metrics.jsonl is absent or unreadable",)),
    Case("metrics nested deeply", run("metrics.jsonl", "[" * 10**6), page=("1 damaged line skipped",)),
    Case("metrics of wild numbers", metrics(step=1e300, loss=10**400), page=("1 damaged line skipped",)),
    Case("metrics of ten thousand terms", run("metrics.jsonl", {**STEP, **TERMS}), page=("Loss terms",)),
    Case("representations whose distances fill the memory", run(LONG, representations((50_000, 1))),
         page=(f"{LONG}: 50000 clips",)),
    Case("representations as wide as the memory", run(LONG, representations((900, 2000))),
         page=(f"{LONG}: 2000 values a clip",)),
    Case("representations of no width", run(LONG, representations((9, 0))), page=(f"{LONG}: shapes",)),
    Case("representations beyond what t-SNE can square", run(LONG, representations((20, 3), 1e300)),
         page=(f"{LONG}: 20 of 20 clips are not finite",)),
    Case("imagined vectors beyond what t-SNE can square",
         run(LONG, representations((20, 3), 1, stand_in=WILD, lacks=TEXT)),
         page=(f"{LONG}: what is imagined",)),
    Case("imagined vectors of no width", run(LONG, representations((20, 3), 1, stand_in=WILD[..., :0], lacks=TEXT)),
         page=(f"{LONG}: what is imagined",)),
    Case("representations that lie", run(LONG, "\xff" * 100), page=(f"{LONG} cannot be read",)),
    Case("attention of ten thousand tokens, a panel each", run(ATTENDS, attention(1, [1] * 10_000)),
         page=(f"{ATTENDS} cannot be read",)),
    Case("attention of a million layers", run(ATTENDS, attention(10**6, [1])), page=(f"{ATTENDS} cannot be read",)),
    Case("attention to a modality that is none", run(ATTENDS, attention(1, [-1])), page=(f"{ATTENDS} cannot be read",)),
    Case("attention over a million frames", run(ATTENDS, attention(4, [1], 10**6)), page=("Not drawn: 0%",)),
    Case("attention of a clip called as a script", run(ATTENDS, attention(2, [1])),
         page=("&lt;script&gt;", "Not drawn")),
    Case("classes called as scripts", run("predictions_test.csv", CLASSES), page=("&lt;script&gt;",)),
    Case("predictions of NUL", run("predictions_test.csv", "label,complete,missing\n\0,\0,\0\n"),
         page=("rows are unusable|cannot be read",)),
    Case("script in names of clips and in what was imagined", run("predictions_test.csv", CLIP),
         page=('<h3 dir="auto">&lt;script&gt;', '<blockquote dir="auto">&lt;script&gt;')),
]
# fmt: on
