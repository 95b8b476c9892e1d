"""PEFT adapter folders, for a language model and for WavLM.

Plain `peft.PeftModel.from_pretrained(base, folder)` loads them. What stands in the attention of transformers' WavLM is
loaded and then not heard: that attention reads the weights of its projections without calling them.
`merge_and_unload()` puts such adapters where they count.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, WavLMModel

from dist_train.adapters import ATTENTION
from dist_train.quantise import bitsandbytes
from sharding.errors import UserError
from sharding.files import MOST_JSON, read_bounded
from tools.convert.base import Base, find_base, open_pickles, open_safetensors
from tools.convert.fingerprint import check_base
from tools.convert.held import Held, Tensors
from tools.convert.merge import PIECES, by_module
from tools.convert.provenance import FILE as PROVENANCE
from tools.convert.safetensors_shards import write_shards
from tools.convert.source import CALLED, PREFIX, Context, Outgoing, Part, Source, check_encoder, others, select
from tools.convert.whole import adapter_config

CONFIG, STEM = "adapter_config.json", "adapter_model"
INSIDE = "base_model.model."  # what PEFT puts before a module's name
MERGE_FIRST = (
    "call merge_and_unload() after loading: transformers' WavLM attention reads the weights of q_proj, k_proj, v_proj "
    "and out_proj without calling them, so an adapter there is heard only once it is merged"
)


def detect(path: Path) -> bool:
    """Whether a folder is an adapter's."""
    return (path / CONFIG).is_file()


def detect_causal(path: Path) -> bool:
    """Whether a folder holds an adapter of a language model."""
    return detect(path) and not of_wavlm(path)


def detect_wavlm(path: Path) -> bool:
    """Whether a folder holds an adapter of WavLM."""
    return detect(path) and of_wavlm(path)


def of_wavlm(path: Path) -> bool:
    """Whether the adapted modules are WavLM's; in doubt (damaged files) no."""
    try:
        return any(name.removeprefix(INSIDE).startswith("encoder.layers.") for name in open_weights(path)[0].shapes)
    except UserError:
        return False


def open_weights(path: Path) -> tuple[Tensors, Path]:
    """The adapter's tensors and their file.

    Raises:
        UserError: there is none, or it is damaged.
    """
    for file in (path / f"{STEM}.safetensors", path / f"{STEM}.bin"):
        if file.is_file():
            return (open_safetensors([file], str(path)) if file.suffix != ".bin" else open_pickles([file])), file
    raise UserError(str(path), f"has {CONFIG} but no {STEM}.safetensors", "Give the whole adapter folder.")


def read_causal(path: Path, context: Context) -> Source:
    """An adapter of a language model."""
    return read(path, "llm")


def read_wavlm(path: Path, context: Context) -> Source:
    """An adapter of WavLM."""
    return read(path, "audio")


def read(path: Path, part: Part) -> Source:
    """An adapter folder by our names.

    Raises:
        UserError: it trains more than LoRA, DoRA or VeRA do, or differently per layer.
    """
    config = read_config(path)
    found, file = open_weights(path)
    names, left = {}, []
    for name in found.shapes:
        piece = next((piece for piece, short in PIECES.items() if name.endswith(f".{short}")), None)
        if piece is None:
            if ".vera_A" in name or ".vera_B" in name:
                left.append(f"{name}: VeRA's projections are drawn from projection_prng_key")
                continue
            raise UserError(
                str(file), f"holds {name}, which is no weight of LoRA, DoRA or VeRA", "Merge it with peft instead."
            )
        module = name.removeprefix(INSIDE).removesuffix(f".{PIECES[piece]}")
        names[f"{PREFIX[part]}{module}.{piece}"] = name
    base = Path(config.base_model_name_or_path) if config.base_model_name_or_path else Path("no base")
    held = Held(select(found, names), state={"bases": bases_told(path)})
    return Source(held, [path / CONFIG, file], adapters={part: config}, left_out=left, base=base)


def bases_told(path: Path) -> dict[str, str]:
    """Fingerprints of the bases, where the folder is one of ours."""
    try:
        told = json.loads(read_bounded(path / PROVENANCE, MOST_JSON, "Remove it."))["bases"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return {str(part): str(value) for part, value in told.items()} if isinstance(told, dict) else {}


def read_config(path: Path) -> Any:
    """adapter_config.json.

    Raises:
        UserError: it is damaged, or of an adapter that is not read.
    """
    bitsandbytes()  # PEFT imports it
    from peft import PeftConfig  # noqa: PLC0415  takes seconds

    where = str(path / CONFIG)
    try:
        config: Any = PeftConfig.from_pretrained(str(path))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(where, f"cannot be read ({error})", "Give a folder that peft saved.") from None
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in ("LORA", "VERA"):
        raise UserError(where, f"is of {kind}", "Only LoRA, DoRA and VeRA are read; merge it with peft instead.")
    odd = [
        key
        for key, plain in (("bias", ("none",)), ("rank_pattern", ({}, None)), ("alpha_pattern", ({}, None)),
                           ("modules_to_save", (None, [])), ("fan_in_fan_out", (False,)))
        if getattr(config, key, plain[0]) not in plain
    ]  # fmt: skip
    if odd:
        raise UserError(where, f"sets {odd[0]}", "This is not read; merge it with peft instead.")
    return config


def plan_causal(source: Source, context: Context) -> Outgoing:
    """An adapter of the language model."""
    return plan(source, context, "llm")


def plan_wavlm(source: Source, context: Context) -> Outgoing:
    """An adapter of WavLM."""
    return plan(source, context, "audio")


def plan(source: Source, context: Context, part: Part) -> Outgoing:
    """The adapters of a part, in fp32 unless `--dtype` is given.

    Raises:
        UserError: the source has none.
    """
    check_encoder(source, part)
    prefix = PREFIX[part]
    adapters = by_module(name for name in source.held.weights.shapes if name.startswith(prefix))
    if not adapters:
        raise UserError(
            "SRC", f"holds no adapter of the {CALLED[part]}", "Write --to huggingface or --to wavlm for full tuning."
        )
    names = {
        f"{INSIDE}{module.removeprefix(prefix)}.{PIECES[piece]}": name
        for module, pieces in adapters.items()
        for piece, name in pieces.items()
    }
    config = adapter_config(source, context, part, [module.removeprefix(prefix) for module in adapters])
    base = find_base(context, part, source.base)
    notes = [] if base.folder else ["the base was drawn at random by the run and lies in no folder: peft needs it too"]
    if context.run is not None:
        expected = source.held.state.get("bases", {}).get(part)
        notes += check_base(base, context.run, part, source.held.weights, expected)
    config.base_model_name_or_path = None if base.folder is None else str(base.folder)
    config.inference_mode = True
    if part == "llm":
        config.task_type = "CAUSAL_LM"
    modules = [module.removeprefix(prefix) for module in adapters]
    if modules_that_peft_would_wrap(base, config.target_modules) != set(modules):
        config.target_modules = set(modules)  # not all of that name: upper layers are not there, or not adapted
    tensors = select(source.held.weights, names, context.dtype)
    if part == "audio" and any(module.rsplit(".", 1)[-1] in ATTENTION for module in modules):
        notes.append(MERGE_FIRST)

    def save(place: Path, chosen: Tensors) -> None:
        write_shards(place, chosen, stem=STEM)
        config.save_pretrained(place)

    return Outgoing(
        tensors,
        save,
        lambda place: reopened(place, base, part),
        "peft.PeftModel",
        files=[CONFIG],
        left_out=others(source, names.values()),
        notes=notes,
        base=base.folder,
    )


def modules_that_peft_would_wrap(base: Base, targets: Any) -> set[str]:
    """Layers of the base whose name ends in a target."""
    linear = [name.removesuffix(".weight") for name, shape in base.tensors.shapes.items() if len(shape) == 2]
    return {name for name in linear if any(f".{name}".endswith(f".{target}") for target in targets)}


def reopened(place: Path, base: Base, part: Part) -> Iterable[tuple[str, Tensor]]:
    """The adapter's weights once plain peft has put them beside the base.

    Raises:
        UserError: peft leaves some out.
    """
    from peft import PeftModel  # noqa: PLC0415  takes seconds

    wrapped: Any = PeftModel.from_pretrained(stock(base, part), str(place))
    state = wrapped.state_dict()
    held = load_file(place / f"{STEM}.safetensors")
    long = {f".{short}": f".{piece}" for piece, short in PIECES.items()}
    for name in held:
        end = next(short for short in long if name.endswith(short))
        inner = name.removesuffix(end) + long[end]
        if inner not in state:
            raise UserError(str(place), f"is not read whole by peft ({name})", "Report this.")
        yield name, state[inner].to(held[name].dtype)


def stock(base: Base, part: Part) -> Any:
    """The base as transformers loads it; one that lies nowhere is made of what is in memory."""
    kind: Any = WavLMModel if part == "audio" else AutoModelForCausalLM
    if base.folder is not None:
        return kind.from_pretrained(base.folder, dtype="auto")
    model: Any = kind(base.config) if part == "audio" else AutoModelForCausalLM.from_config(base.config)
    model.load_state_dict(dict(base.tensors), strict=False, assign=True)
    return model.to(torch.float32)
