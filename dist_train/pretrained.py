"""Loading transformers models and configurations, with errors a user can act on."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from sharding.errors import UserError

WHERE_TO_FIND = "Give a local folder, or a hub id this machine can reach."
MOST_LAYERS = 1000  # of a model; a configuration is a few bytes, and its layers are built one by one
# What transformers raises for files that are absent, damaged, of another model, or in need of a missing package.
LOAD_ERRORS = (
    *(OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError),
    *(SafetensorError, pickle.UnpicklingError),
)


def cannot_load(where: str, name: str, error: Exception) -> UserError:
    """The error for a model or tokenizer that transformers cannot load."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if name.startswith(("/", "./", "../", "~")) and not Path(name).exists():
        reason = "there is no such file or folder"
    return UserError(where, f"cannot load {name!r} ({reason})", WHERE_TO_FIND)


def load_model(
    kind: Any,
    where: str,
    name: str,
    *,
    dtype: torch.dtype,
    quantization_config: BitsAndBytesConfig | None = None,
    unused: str | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """kind.from_pretrained, which fills weights the files lack with random numbers: here that is an error.

    Args:
        kind: a model class of transformers, or an Auto class.
        where: recipe key, for messages.
        name: local folder or hub id.
        dtype: of the weights. They are cast, and quantised, one by one while they are read.
        unused: beginning of the names of weights that the caller does not use: they may be absent.
        settings: fields of the configuration to override.

    Raises:
        UserError: it cannot be loaded, or is another model.
    """
    if quantization_config is not None:
        settings["quantization_config"] = quantization_config
    try:
        too_deep = next(layer_problems(PretrainedConfig.get_config_dict(name)[0], where), None)
        if too_deep is not None:
            raise too_deep
        # Code that a folder brings along is never run; of pickled weights transformers reads tensors only.
        model, loaded = kind.from_pretrained(
            name, output_loading_info=True, dtype=dtype, trust_remote_code=False, **settings
        )
    except LOAD_ERRORS as error:
        raise cannot_load(where, name, error) from None
    absent = sorted(key for key in loaded["missing_keys"] if unused is None or not key.startswith(unused))
    if absent:
        raise UserError(
            where,
            f"{name!r} lacks {len(absent)} weights of a {type(model).__name__}, e.g. {absent[0]}",
            "Give the folder or hub id of a model of that kind.",
        )
    return model


_FAILURES: dict[tuple[type, str], str] = {}  # of models that config_problems has tried: what they raised, or ""


def config_problems(
    kind: type[PreTrainedModel], fields: dict[str, Any], where: str, example: dict[str, Tensor]
) -> Iterable[UserError]:
    """Fields that the model's configuration does not know (it would take and ignore them), or with which it cannot run.

    Args:
        kind: model class.
        fields: of its configuration.
        where: recipe key of the fields.
        example: an input to try the model on; it runs on the meta device, which computes shapes only.
    """
    config: Any = kind.config_class
    known = config().to_dict().keys()
    unknown = [name for name in fields if name not in known]
    for name in unknown:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        remedy = f"Did you mean {where}.{near[0]}?" if near else f"See the fields of transformers.{config.__name__}."
        yield UserError(f"{where}.{name}", f"is not a field of {config.__name__}", remedy)
    too_deep = list(layer_problems(fields, where))
    yield from too_deep
    if unknown or too_deep:
        return
    tried = (kind, repr(fields))
    if tried not in _FAILURES:  # a sweep asks of the same model at every point
        try:
            # Even on meta some layers draw from the CPU's generator; what is checked must not change a run.
            with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
                kind(config(**fields)).eval()(**{name: value.to("meta") for name, value in example.items()})
            _FAILURES[tried] = ""
        except Exception as error:  # whatever it raises, the fields are to blame
            _FAILURES[tried] = " ".join(f"{type(error).__name__}: {error}".split())
    reason = _FAILURES[tried]
    if reason:
        yield UserError(where, f"does not make a working model ({reason})", f"See transformers.{config.__name__}.")


def layer_problems(fields: Mapping[str, Any], where: str) -> Iterator[UserError]:
    """Numbers of layers that would take hours to build."""
    for name, value in fields.items():
        if "layers" in name and isinstance(value, int | float) and not value <= MOST_LAYERS:
            yield UserError(f"{where}.{name}", f"is {value:g}", f"Write at most {MOST_LAYERS}.")
