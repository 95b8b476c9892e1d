"""The one table of formats that `dist-train convert` knows; docs/conversion.md is written from it.

Imports nothing heavy: a format's functions are named as "module:function" of this package.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sharding.errors import UserError


@dataclass(frozen=True)
class Format:
    """A format.

    Args:
        name: as in `--to`.
        what: it is.
        looks: what it is recognised by.
        keeps: what of a checkpoint it holds.
        parts: the same, to tell which formats share something.
        detect: function (path) → whether it is there.
        read: function (path, context) → Source; None where it is not read.
        plan: function (source, context) → Outgoing; None where it is not written.
        needs_to_read: beside the source.
        needs_to_write: beside a checkpoint of ours in its run directory.
        opened_by: what reads the result again before it counts.
        why_not: where it is not read, or not written.
    """

    name: str
    what: str
    looks: str
    keeps: str
    parts: tuple[str, ...]
    detect: str
    read: str | None = None
    plan: str | None = None
    needs_to_read: str = ""
    needs_to_write: str = ""
    opened_by: str = ""
    why_not: str = ""


ALL = ("llm", "llm adapter", "audio", "audio adapter", "projector", "fusion")
MERGED = {"llm adapter": "llm", "audio adapter": "audio"}  # what an adapter and its base make together
WHOLE_LLM = "the whole language model"
WHOLE_WAVLM = "the whole WavLM"
INTO_RUN = "into `portable`: `--run`, whose checkpoint gives the rest"

FORMATS = (
    Format(
        name="portable",
        what="a checkpoint of ours, or the best one of a run directory",
        looks="`manifest.json`, or `recipe.yaml` of a run",
        keeps="trained weights in fp32, optimizer, progress",
        parts=ALL,
        detect="portable_folder:detect",
        read="portable_folder:read",
        plan="portable_folder:plan",
        needs_to_write="`--run` where the source holds not all that a run trains: the run's best checkpoint gives the "
        "rest, and no optimizer state is kept then",
        opened_by="`sharding.portable`, every checksum",
    ),
    Format(
        name="deepspeed",
        what="a checkpoint of DeepSpeed's `engine.save_checkpoint`, ZeRO-0 to 3, trained weights alone too",
        looks="`*_model_states.pt`, or `latest`",
        keeps="trained weights in fp32, optimizer; frozen weights are left out",
        parts=ALL,
        detect="deepspeed_native:detect",
        read="deepspeed_folder:read_native",
        why_not="not written: its files are cut for one number of ranks and one stage. DeepSpeed loads "
        "`deepspeed-universal` at any",
    ),
    Format(
        name="deepspeed-universal",
        what="a universal checkpoint of DeepSpeed",
        looks="`zero/`, or `latest_universal`",
        keeps="trained weights in fp32, optimizer",
        parts=ALL,
        detect="deepspeed_universal:detect",
        read="deepspeed_folder:read_universal",
        plan="deepspeed_folder:plan",
        needs_to_write="as `portable`",
        opened_by="the reader of this format",
    ),
    Format(
        name="huggingface",
        what="a Hugging Face folder of a causal language model, adapters merged",
        looks="`config.json` of another model than WavLM, and weights",
        keeps=f"{WHOLE_LLM} in bf16 (`--dtype fp32`), tokenizer",
        parts=("llm",),
        detect="huggingface:detect_causal",
        read="huggingface:read_causal",
        plan="huggingface:plan_causal",
        needs_to_read=f"{INTO_RUN}; only where `text.tuning` is `full`",
        needs_to_write="the unquantised base: `text.pretrained` of the run, or `--base`",
        opened_by="`AutoModelForCausalLM`, `AutoTokenizer`",
    ),
    Format(
        name="peft",
        what="an adapter folder of PEFT for the language model (LoRA, DoRA, VeRA)",
        looks="`adapter_config.json`",
        keeps="the language model's adapters",
        parts=("llm adapter",),
        detect="peft_folder:detect_causal",
        read="peft_folder:read_causal",
        plan="peft_folder:plan_causal",
        needs_to_read=f"{INTO_RUN}; into `huggingface`: the base it names, or `--base`",
        needs_to_write="`text.pretrained` of the run, or `--base`",
        opened_by="`peft.PeftModel`",
    ),
    Format(
        name="peft-wavlm",
        what="an adapter folder of PEFT for WavLM",
        looks="`adapter_config.json`, modules `encoder.layers.*`",
        keeps="WavLM's adapters",
        parts=("audio adapter",),
        detect="peft_folder:detect_wavlm",
        read="peft_folder:read_wavlm",
        plan="peft_folder:plan_wavlm",
        needs_to_read=f"{INTO_RUN}; into `wavlm`: the base it names, or `--base`",
        needs_to_write="`audio.pretrained` of the run, or `--base`",
        opened_by="`peft.PeftModel`",
    ),
    Format(
        name="wavlm",
        what="a Hugging Face folder of WavLM, adapters merged",
        looks="`config.json` of WavLM, and weights",
        keeps=f"{WHOLE_WAVLM} in fp32 (`--dtype bf16`), feature extractor",
        parts=("audio",),
        detect="huggingface:detect_wavlm",
        read="huggingface:read_wavlm",
        plan="huggingface:plan_wavlm",
        needs_to_read=f"{INTO_RUN}; only where `audio.tuning` is `full`",
        needs_to_write="the unquantised base: `audio.pretrained` of the run, or `--base`",
        opened_by="`WavLMModel`",
    ),
    Format(
        name="sdumc",
        what="SDUMC's published fusion checkpoint, both imagination skips (a folder with `fusion.pt`)",
        looks="`.pt` with `fra2utt_0.*`",
        keeps="the fusion network",
        parts=("fusion",),
        detect="sdumc:detect",
        read="sdumc:read",
        plan="sdumc:plan",
        needs_to_read=f"{INTO_RUN} and whose `imagination.skip` must be the file's",
        needs_to_write="`imagination.enabled: true`",
        opened_by="`torch.load(weights_only=True)`",
    ),
    Format(
        name="fairseq-wavlm",
        what="WavLM as its authors published it (`WavLM-Large.pt`, `WavLM-Base+.pt`)",
        looks="`.pt` with `cfg` and `model`",
        keeps=WHOLE_WAVLM,
        parts=("audio",),
        detect="fairseq_wavlm:detect",
        read="fairseq_wavlm:read",
        why_not="not written: all that reads it reads Hugging Face folders too",
    ),
    Format(
        name="meta-llama",
        what="Meta's consolidated Llama 1, 2 and 3.0",
        looks="`params.json` and `consolidated.*.pt`",
        keeps=f"{WHOLE_LLM}, `tokenizer.model`",
        parts=("llm",),
        detect="llama:detect_meta",
        read="llama:read_meta",
        needs_to_read="`tokenizer.model` in the folder, or `--run`",
        why_not="not written: Meta's loader is not used for anything our model becomes",
    ),
    Format(
        name="llama2c",
        what="llama2.c's `.bin`, version 0 (fp32)",
        looks="`.bin` whose first seven integers are a Llama's sizes",
        keeps=f"{WHOLE_LLM}, tokenizer",
        parts=("llm",),
        detect="llama:detect_llama2c",
        read="llama:read_llama2c",
        needs_to_read="`tokenizer.bin`, `tok*.bin` or `tokenizer.model` beside it",
        why_not="not written: llama2.c has an exporter of its own that reads Hugging Face folders",
    ),
    Format(
        name="slam",
        what="SLAM-LLM's `model.pt`, DeepSpeed's consolidated `pytorch_model.bin`",
        looks="`encoder_projector.*`, `llm.base_model.model.*`, or our names",
        keeps="projector, the language model's LoRA; read under our names also all else",
        parts=("projector", "llm adapter"),
        detect="slam:detect",
        read="slam:read",
        plan="slam:plan",
        needs_to_read=f"{INTO_RUN}; `--run` tells the adapter's scale, which the file lacks",
        opened_by="`torch.load(weights_only=True)`",
    ),
)


def shared(source: Format, result: Format) -> bool:
    """Whether one can go into the other."""
    held = {*source.parts, *(MERGED[part] for part in source.parts if part in MERGED)}
    return bool(source.read and result.plan and held & set(result.parts))


def by_name(name: str) -> Format:
    """The format that `--to` names.

    Raises:
        UserError: none is called so, or it is not written.
    """
    writable = ", ".join(one.name for one in FORMATS if one.plan)
    found = next((one for one in FORMATS if one.name == name), None)
    if found is None:
        raise UserError("--to", f"{name!r} is no format", f"Write one of {writable}.")
    if found.plan is None:
        raise UserError("--to", f"{name} is {found.why_not}", f"Write one of {writable}.")
    return found


def detect(path: Path) -> Format:
    """The format of a source.

    Raises:
        UserError: it is not there, or of none.
    """
    if not path.exists():
        raise UserError(str(path), "is not there", "Give the file or folder to convert.")
    for one in FORMATS:
        if function(one.detect)(path):
            return one
    function("pickles:explain")(path)
    raise UserError(
        str(path),
        "is of no format that is known",
        "docs/conversion.md tells what each is recognised by; a truncated file is not recognised either.",
    )


def function(name: str) -> Callable[..., Any]:
    """ "module:function" of this package."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f"tools.convert.{module}"), attribute)
