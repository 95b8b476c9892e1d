"""docs/conversion.md from the table of formats: `python -m tools.convert.page` writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tools.convert.formats import FORMATS, shared

PAGE = Path(__file__).parents[2] / "docs" / "conversion.md"

HEAD = """# Conversion

Written by `python -m tools.convert.page` from the table in `tools/convert/formats.py`; a test keeps it up to date.

```sh
dist-train convert SRC DST --to FORMAT [--run RUN] [--base FOLDER] [--dtype fp32|bf16] [--dry-run]
```

`SRC` is a run directory (its best checkpoint), a checkpoint folder, or a foreign file or folder; its format is found
out and said. `DST` is a folder to make. Tensors pass one by one; the result is written beside, read again with the
library of its users, compared tensor by tensor, and renamed; if anything goes wrong nothing is left. `provenance.json`
in it tells source, checksums, command, date and what was left out. `--run` is found where `SRC` is a run or lies in
one. Foreign pickles are opened with `weights_only=True`; what would need more is refused by name.

## Formats

"""

TAIL = """
## What goes into what

Everything is read into the names of our model and written from them, so a cell needs only that the two formats share
a part: `yes`; what they do not share is left out, and said. Empty: they share nothing. Each `yes` is a conversion in
`tests/tools/convert/test_matrix.py`, judged by logits, hidden states or predictions of the library that users have.

"""

NOTES = """
**A whole model and a run.** A `huggingface` or `wavlm` folder becomes part of a run's checkpoint only where that run
trains the part in full beside the same frozen rest. To start a run from such a folder no conversion is needed: write
`text.pretrained: FOLDER` or `audio.pretrained: FOLDER` in its recipe. A merged model is never split into base and
adapter again.

**Quantised runs.** Adapters are merged into the unquantised base only. The run trained beside rounded weights, so the
merged model differs from the run's by that rounding; the command says so.

**The base.** Merging and `peft` compare the base with the fingerprint that the checkpoint keeps of it. A quantised run
keeps that of the quantised weights: the base is quantised once more for it, layer by layer.

**WavLM and plain peft.** transformers' WavLM attention reads the weights of `q_proj`, `k_proj`, `v_proj` and `out_proj`
without calling them. `PeftModel.from_pretrained` loads adapters there without an error and they stay unheard;
`merge_and_unload()` puts them where they count. Adapters on `intermediate_dense` and `output_dense` are heard as they
are. Or convert to `wavlm`, where they are merged already.

**SDUMC.** The official code has two classes of one name, one per imagination skip. Only that of the `transition` skip
has `normali.*`, so a file tells which it is of. Names begin with `model.`, as `get_models` holds them: the official
script loads with `strict=False` and would pass over other names in silence.

**DeepSpeed and universal checkpoints.** DeepSpeed (0.19.8) loads what is written here at ZeRO-1, 2 and 3, also across
stages, which its own universal files do not allow. It leaves frozen weights and buffers as the engine has them. At
ZeRO-3 with several parameter groups it gives all of them one step tensor, which Adam then counts once per group: clone
each `state["step"]` after loading. It holds no learning rate scheduler: load with `load_lr_scheduler_states=False`.

**fp32 masters.** A checkpoint keeps fp32 masters of what it trains. `huggingface` rounds to bf16 unless told otherwise:
converted back from there, weights are the rounded ones.
"""


def page() -> str:
    """The page."""
    return HEAD + "\n".join(table()) + "\n" + TAIL + "\n".join(matrix()) + "\n" + NOTES


def table() -> Iterator[str]:
    """The formats, one a row."""
    yield "| format | what it is | recognised by | holds | read: needs | written: needs | read again with |"
    yield "|---|---|---|---|---|---|---|"
    for one in FORMATS:
        read = (one.needs_to_read or "–") if one.read else one.why_not
        written = (one.needs_to_write or "–") if one.plan else one.why_not
        cells = [f"`{one.name}`", one.what, one.looks, one.keeps, read, written, one.opened_by or "–"]
        yield f"| {' | '.join(cells)} |"


def matrix() -> Iterator[str]:
    """Sources against results; tests/tools/convert/test_matrix.py converts each cell."""
    results = [one for one in FORMATS if one.plan]
    yield f"| from \\ to | {' | '.join(f'`{one.name}`' for one in results)} |"
    yield "|---" * (len(results) + 1) + "|"
    for source in FORMATS:
        if source.read:
            marks = ["yes" if shared(source, result) else "" for result in results]
            yield f"| `{source.name}` | {' | '.join(marks)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
