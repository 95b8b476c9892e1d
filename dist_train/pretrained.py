"""Loading transformers models and configurations, with errors a user can act on."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from sharding.errors import UserError

WHERE_TO_FIND = "Give a local folder, or a hub id this machine can reach."
MOST_LISTED = 10  # model types in a message
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


def load_config(where: str, name: str) -> PretrainedConfig:
    """The configuration of a pretrained model.

    Raises:
        UserError: it cannot be loaded.
    """
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise cannot_load(where, name, error) from None
    return config


_FAILURES: dict[tuple[str, str], str] = {}  # of models that config_problems has tried: what they raised, or ""


def config_problems(
    fields: dict[str, Any],
    where: str,
    kinds: Collection[str],
    default: str,
    build: Callable[[Any], nn.Module],
    example: Callable[[Any], dict[str, Tensor]],
) -> Iterator[UserError]:
    """Fields that the model's configuration does not know (it would take and ignore them), or with which it cannot run.

    Args:
        fields: of its configuration, `model_type` among them.
        where: recipe key of the fields.
        kinds: values that `model_type` may have.
        default: where it is not given.
        build: makes the model of a configuration.
        example: an input to try the model of a configuration on; it runs on the meta device, which computes shapes
            only.
    """
    kind = fields.get("model_type", default)
    if not isinstance(kind, str) or kind not in kinds:
        near = difflib.get_close_matches(str(kind), kinds, n=1, cutoff=0.5)
        known = sorted(kinds)
        listed = ", ".join(known) if len(known) < MOST_LISTED else f"a model type of transformers, e.g. {default}"
        remedy = f"Did you mean {near[0]}?" if near else f"Write {listed}."
        yield UserError(f"{where}.model_type", f"cannot be {str(kind)[:60]!r}", remedy)
        return
    config: Any = CONFIG_MAPPING[kind]
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
                made = make_config(fields, default)
                inputs = {name: value.to("meta") for name, value in example(made).items()}
                build(made).eval()(**inputs)
            _FAILURES[tried] = ""
        except UserError as error:
            yield error
            return
        except Exception as error:  # whatever it raises, the fields are to blame
            _FAILURES[tried] = " ".join(f"{type(error).__name__}: {error}".split())
    reason = _FAILURES[tried]
    if reason:
        yield UserError(where, f"does not make a working model ({reason})", f"See transformers.{config.__name__}.")


def make_config(fields: dict[str, Any], default: str) -> PretrainedConfig:
    """The configuration of these fields; `default` is its model type where they name none."""
    config: PretrainedConfig = AutoConfig.for_model(**{"model_type": default, **fields})
    return config


def layer_problems(fields: Mapping[str, Any], where: str) -> Iterator[UserError]:
    """Numbers of layers that would take hours to build."""
    for name, value in fields.items():
        if "layers" in name and isinstance(value, int | float) and not value <= MOST_LAYERS:
            yield UserError(f"{where}.{name}", f"is {value:g}", f"Write at most {MOST_LAYERS}.")
