"""A recipe as YAML text: plain values with overrides applied, no setting looked at. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sharding.errors import UserError


def read_values(path: Path, overrides: Iterable[str] = ()) -> tuple[Any, list[UserError]]:
    """Reads a recipe and applies `a.b=c` overrides.

    Returns:
        The plain values (None where a ${…} cannot be filled in), and what is wrong with overrides and ${…}.

    Raises:
        UserError: the file cannot be read as YAML.
    """
    config, errors = read(path), []
    for text in overrides:
        key, equals, _ = text.partition("=")
        try:
            if not equals or not all(key.split(".")):
                raise ValueError("it is not key=value")
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([text]))
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, LookupError) as error:
            remedy = "Write key=value, e.g. training.epochs=3; the value is YAML."
            errors.append(UserError(text, f"cannot be applied ({one_line(error)})", remedy))
    try:
        return OmegaConf.to_container(config, resolve=True), errors
    except OmegaConfBaseException as error:
        return None, [*errors, UserError(str(path), one_line(error).rstrip("."), r"Write \${…} for a literal ${…}.")]


def read(path: Path) -> Any:
    """The mapping in a YAML file.

    Raises:
        UserError: there is none.
    """
    example = "Give the path of a recipe such as recipes/quickstart.yaml."
    try:
        values = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise UserError(str(path), f"is not YAML ({one_line(error)})", "Correct the file at that place.") from None
    except OSError as error:
        raise UserError(str(path), f"cannot be read ({error.strerror or one_line(error)})", example) from None
    if not OmegaConf.is_dict(values):
        raise UserError(str(path), "is not a mapping of keys to values", example)
    return values


def one_line(error: Exception) -> str:
    """The error's message without its line breaks."""
    return " ".join(str(error).split())


def write_values(values: Any, path: Path) -> None:
    """Writes plain values so that `read_values` reads back the same."""
    plain = escaped(values)
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(text) != plain:  # some characters count as line breaks: written as escapes
        text = yaml.safe_dump(plain, sort_keys=False)
    path.write_text(text, encoding="utf-8")


def escaped(value: Any) -> Any:
    """Nested values whose strings OmegaConf reads back literally: ${…} would be looked up."""
    if isinstance(value, dict):
        return {key: escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [escaped(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
