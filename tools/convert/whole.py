"""A whole language model or WavLM by the stock model's names: the base with what was trained put into it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from dist_train.adapters import ATTENTION, peft_config
from sharding.errors import UserError
from tools.convert.base import Base, find_base
from tools.convert.fingerprint import check_base
from tools.convert.held import Tensors
from tools.convert.merge import Projections, by_module, draw_projections, merged
from tools.convert.source import CALLED, KEY, PREFIX, Context, Part, Source, check_encoder, select


class Whole(NamedTuple):
    """A model.

    Args:
        tensors: by the stock model's names.
        config: of the model.
        base: None where the source is whole itself.
        taken: names of the source's weights that are in it.
        notes: what a user should know.
    """

    tensors: Tensors
    config: PretrainedConfig
    base: Base | None
    taken: list[str]
    notes: list[str]


def whole_model(source: Source, context: Context, part: Part, dtype: torch.dtype | None) -> Whole:
    """The model of a part, tensor by tensor.

    Args:
        dtype: of its floating-point weights; None leaves each that of the base.

    Raises:
        UserError: the source has nothing of it, or its base does not fit.
    """
    check_encoder(source, part)
    prefix = PREFIX[part]
    weights = source.held.weights
    named = {name.removeprefix(prefix): name for name in weights.shapes if name.startswith(prefix)}
    if not named:
        raise UserError(
            "SRC",
            f"holds nothing that was trained of the {CALLED[part]}",
            f"If it was frozen, use the model of {KEY[part]}.pretrained as it is.",
        )
    if part in source.models:
        unused = ["--base is not used: the source is whole"] if context.base is not None else []
        return Whole(select(weights, named, dtype), source.models[part], None, list(named.values()), unused)
    base = find_base(context, part, source.base)
    notes = []
    if context.run is not None:
        expected = source.held.state.get("bases", {}).get(part)
        notes += check_base(base, context.run, part, weights, expected)
        quantisation = (context.run.recipe.audio if part == "audio" else context.run.recipe.text).quantisation
        if quantisation != "none":
            notes.append(
                f"the {CALLED[part]} was trained beside {quantisation} weights and is merged into the unquantised "
                "ones: its answers differ by the rounding that training saw"
            )
    adapters = by_module(named)
    full = {name for name in named if not any(name in pieces.values() for pieces in adapters.values())}
    unknown = sorted(
        (full - base.tensors.shapes.keys()) | {x for x in adapters if f"{x}.weight" not in base.tensors.shapes}
    )
    if unknown:
        raise UserError("SRC", f"has {unknown[0]}, which its base does not have", "Give the base it was trained on.")
    config = adapter_config(source, context, part, adapters) if adapters else None
    check_ranks(config, adapters, weights, named)
    projections = projections_for(config, base, adapters, context) if adapters else None
    kinds = {name: dtype if dtype and x.is_floating_point else x for name, x in base.tensors.dtypes.items()}

    def read(name: str) -> Tensor:
        module = name.removesuffix(".weight")
        if name in full:
            value = weights.read(named[name])
        elif module in adapters and name.endswith(".weight"):
            pieces = {piece: weights.read(named[inner]) for piece, inner in adapters[module].items()}
            value = merged(base.tensors.read(name), pieces, config, projections)
        else:
            value = base.tensors.read(name)
        return value.to(kinds[name])

    for name in full:
        if weights.shapes[named[name]] != base.tensors.shapes[name]:
            raise UserError(
                "SRC",
                f"has {name} of shape {weights.shapes[named[name]]}, its base {base.tensors.shapes[name]}",
                "Give the base it was trained on.",
            )
    return Whole(Tensors(base.tensors.shapes, kinds, read), base.config, base, list(named.values()), notes)


def check_ranks(config: Any, adapters: dict[str, dict[str, str]], weights: Tensors, named: dict[str, str]) -> None:
    """Compares the adapters' rank with what their configuration says.

    Raises:
        UserError: they differ.
    """
    for pieces in adapters.values():
        for piece in ("lora_A.default.weight", "vera_lambda_d.default"):
            shape = weights.shapes[named[pieces[piece]]] if piece in pieces else [config.r]
            if shape[:1] != [config.r]:
                raise UserError(
                    "SRC",
                    f"has {pieces[piece]} of shape {shape}, its rank is said to be {config.r}",
                    "Give its own run.",
                )


def adapter_config(source: Source, context: Context, part: Part, modules: Iterable[str]) -> Any:
    """PEFT's configuration of a part's adapters: the source's own, or as the run's recipe says.

    Raises:
        UserError: nothing tells how they are scaled.
    """
    if part in source.adapters:
        return source.adapters[part]
    run = context.needs_run(f"its recipe tells how the {CALLED[part]}'s adapters are scaled")
    settings = run.recipe.audio if part == "audio" else run.recipe.text
    if settings.tuning in ("frozen", "full"):
        raise UserError(
            str(run.path),
            f"trains no adapter ({KEY[part]}.tuning is {settings.tuning}), and SRC holds one",
            "Give the run it belongs to.",
        )
    adapter = getattr(settings, settings.tuning)
    return peft_config(adapter, targets(modules, adapter.target_modules))


def targets(modules: Iterable[str], named: list[str] | None) -> list[str]:
    """The shortest names that mean these modules, for PEFT."""
    ends = {module.rsplit(".", 1)[-1] for module in modules}
    return named or [name for name in ATTENTION if name in ends] or sorted(ends)


def projections_for(
    config: Any, base: Base, adapters: dict[str, dict[str, str]], context: Context
) -> Projections | None:
    """VeRA's projections in the run's precision; None for other adapters."""
    if config.peft_type != "VERA":
        return None
    shapes = [base.tensors.shapes[f"{module}.weight"] for module in adapters]
    drawn = draw_projections(config, max(x[1] for x in shapes), max(x[0] for x in shapes))
    dtype = context.run.recipe.dtype if context.run is not None else torch.float32
    return Projections(drawn.a.to(dtype), drawn.b.to(dtype))
