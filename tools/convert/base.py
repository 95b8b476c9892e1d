"""The frozen weights a checkpoint was trained beside, unquantised, by the names of the stock model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, WavLMConfig, WavLMModel

from dist_train.audio import build_encoder
from dist_train.build import build_model
from dist_train.pretrained import LOAD_ERRORS, cannot_load, layer_problems
from dist_train.speech_encoders import WAVLM
from sharding.errors import UserError
from tools.convert.held import Tensors
from tools.convert.pickles import load_pickle, tensors_of
from tools.convert.source import CALLED, KEY, Context, Part, Run, in_memory, select

OLD_NORM = {".weight_g": ".parametrizations.weight.original0", ".weight_v": ".parametrizations.weight.original1"}


@dataclass(frozen=True)
class Base:
    """Frozen weights.

    Args:
        tensors: by the names of the stock model (AutoModelForCausalLM, WavLMModel).
        config: its configuration.
        folder: where they lie; None where a run drew them at random.
        files: of them.
    """

    tensors: Tensors
    config: PretrainedConfig
    folder: Path | None
    files: list[Path]


def find_base(context: Context, part: Part, named: Path | None = None) -> Base:
    """The base of a part: `--base`, else the folder that the source names, else what the run's recipe says.

    Raises:
        UserError: nothing tells, or it cannot be read.
    """
    if context.base is not None:
        return open_folder(context.base, part, "--base")
    if named is not None and named.is_dir():
        return open_folder(named, part, "--base")
    called = CALLED[part]
    run = context.needs_run(f"its recipe tells the {called}'s base") if named is None else context.run
    if run is None:
        raise UserError(
            "--base", f"is needed: the source names {named}, which is no folder here", f"Give the {called}'s folder."
        )
    name = (run.recipe.audio if part == "audio" else run.recipe.text).pretrained
    if part == "audio" and run.recipe.audio.input == "features":
        raise UserError(str(run.path), "has no WavLM (audio.input is features)", "Choose another format.")
    kind = (run.recipe.audio.config or {}).get("model_type", WAVLM)
    if part == "audio" and kind != WAVLM:
        raise UserError(str(run.path), f"has a {kind} encoder; only WavLM's can be converted", "Choose another format.")
    if name is not None:
        return open_folder(local_folder(name, f"{KEY[part]}.pretrained"), part, f"{KEY[part]}.pretrained")
    return drawn(run, part)


def local_folder(name: str, where: str) -> Path:
    """A folder, or a hub id that has been downloaded before.

    Raises:
        UserError: it is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError, OSError):
        raise UserError(where, f"{name!r} is neither a folder here nor downloaded", "Give it by --base.") from None


def drawn(run: Run, part: Part) -> Base:
    """What a run without pretrained files started from: drawn again from its seed, without quantisation."""
    recipe = run.recipe.model_copy(deep=True)
    recipe.audio.quantisation = recipe.text.quantisation = "none"
    if part == "audio":
        torch.manual_seed(recipe.seed)  # WavLM is the first that draws
        model: Any = build_encoder(recipe.audio, recipe.dtype)
        config: PretrainedConfig = model.config
        weights = dict(model.state_dict())
    else:
        model = build_model(recipe, run.tokenizer(), resumed=True).llm.causal
        config = type(model.config).from_dict(model.config.to_dict())
        weights = {name.replace(".base_layer.", "."): x for name, x in model.state_dict().items()}
    config.architectures = [type(model).__name__]
    kept = stock_shapes(config, part)
    weights = {name: x.to(recipe.dtype) for name, x in weights.items() if name in kept}
    return Base(in_memory(weights), config, None, [])


def open_folder(folder: Path, part: Part, where: str) -> Base:
    """A Hugging Face folder of the kind of model that `part` is; what else it holds is left out.

    Raises:
        UserError: it is another one, quantised, or incomplete.
    """
    config = read_config(folder, part, where)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(where, f"{folder} holds a quantised model", "Give the folder of the unquantised one.")
    tensors, files = read_folder(folder, where)
    wanted = stock_shapes(config, part)
    held = {stock_name(name, part): name for name in tensors.shapes}
    absent = sorted(wanted.keys() - held.keys())
    if absent:
        raise UserError(
            where,
            f"{folder} lacks {len(absent)} weights of a {CALLED[part]}, e.g. {absent[0]}",
            "Give the whole folder of a model of that kind.",
        )
    wrong = next((name for name, shape in wanted.items() if tensors.shapes[held[name]] != shape), None)
    if wrong is not None:
        raise UserError(
            where,
            f"{folder} has {wrong} of shape {tensors.shapes[held[wrong]]}, its config.json says {wanted[wrong]}",
            "Give a folder whose files belong together.",
        )
    return Base(select(tensors, {name: held[name] for name in wanted}), config, folder, files)


def read_config(folder: Path, part: Part, where: str) -> PretrainedConfig:
    """config.json of a folder.

    Raises:
        UserError: it is missing or of another kind of model.
    """
    if not folder.is_dir():
        raise UserError(where, f"{folder} is no folder", f"Give the folder of the {CALLED[part]}.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise cannot_load(where, str(folder), error) from None
    too_deep = next(layer_problems(config.to_dict(), where), None)
    if too_deep is not None:
        raise too_deep
    if isinstance(config, WavLMConfig) != (part == "audio"):
        raise UserError(where, f"{folder} holds a {config.model_type} model", f"Give the folder of the {CALLED[part]}.")
    return config


def stock_model(config: PretrainedConfig, part: Part) -> Any:
    """transformers' own model on the meta device.

    Raises:
        UserError: the configuration makes none.
    """
    kind: Any = WavLMModel
    try:
        with torch.device("meta"):
            return kind(config) if part == "audio" else AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever it raises, the configuration is to blame
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        where = config.name_or_path or "SRC"
        raise UserError(where, f"has a configuration that makes no model ({reason})", "Give a whole model.") from None


def stock_shapes(config: PretrainedConfig, part: Part) -> dict[str, list[int]]:
    """Shapes of the stock model's weights; of tied ones the first name only."""
    model = stock_model(config, part)
    parameters = {name: list(x.shape) for name, x in model.named_parameters()}
    kept = model.state_dict().keys()
    buffers = {name: list(x.shape) for name, x in model.named_buffers() if name in kept}
    return {**parameters, **buffers}


def stock_name(name: str, part: Part) -> str:
    """A file's name of a weight → that in memory."""
    if part == "audio":
        name = name.removeprefix("wavlm.")
        for old, new in OLD_NORM.items():
            if name.endswith(old):
                return name.removesuffix(old) + new
    return name


def read_folder(folder: Path, where: str) -> tuple[Tensors, list[Path]]:
    """All tensors of a Hugging Face folder's weight files, and these files.

    Raises:
        UserError: there are none, or one is damaged.
    """
    for stem, end in (("model", "safetensors"), ("pytorch_model", "bin")):
        files = sorted(folder.glob(f"{stem}.{end}")) or sorted(folder.glob(f"{stem}-*-of-*.{end}"))
        if files:
            break
    else:
        raise UserError(where, f"{folder} has no model*.safetensors or pytorch_model*.bin", "Give the whole folder.")
    whole = {int(file.stem.rpartition("-of-")[2]) for file in files if "-of-" in file.stem}
    if whole and whole != {len(files)}:
        raise UserError(where, f"{folder} has {len(files)} of {max(whole)} weight files", "Give the whole folder.")
    return (open_safetensors(files, where) if end == "safetensors" else open_pickles(files)), files


def open_safetensors(files: list[Path], where: str) -> Tensors:
    """Tensors of several safetensors files, read when asked for."""
    shapes: dict[str, list[int]] = {}
    dtypes: dict[str, torch.dtype] = {}
    readers: dict[str, Callable[[str], Tensor]] = {}
    for path in files:
        try:
            file = safe_open(path, "pt")
            for name in file.keys():  # noqa: SIM118
                rows = file.get_slice(name)
                shapes[name], readers[name] = rows.get_shape(), file.get_tensor
                dtypes[name] = rows[:1].dtype if shapes[name] else file.get_tensor(name).dtype
        except (OSError, SafetensorError) as error:
            raise UserError(where, f"{path} cannot be read ({error})", "Give the whole file.") from None
    return Tensors(shapes, dtypes, lambda name: readers[name](name))


def open_pickles(files: list[Path]) -> Tensors:
    """Tensors of several files of torch.save, mapped."""
    return in_memory({name: x for path in files for name, x in tensors_of(load_pickle(path), path).items()})
