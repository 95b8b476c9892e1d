"""A recipe as YAML text: plain values with overrides applied, no setting looked at. Imports nothing heavy."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sharding.errors import UserError
from sharding.files import MOST_YAML, read_bounded
from sharding.plain_yaml import MOST_DEPTH, check_yaml

MOST_REFERENCES = 16  # ${…}: each may copy what others have copied, so that 80 in a row fill any memory
SHORT = ("task", "imagination", "refine")  # sections of which one word is the kind: `refine: vgmr`
EXAMPLE = "Give the path of a recipe such as recipes/quickstart.yaml."
# A recipe refers to its own keys alone: it may come from anywhere, and what it resolves to is printed and kept.
for resolver in ("oc.create", "oc.decode", "oc.deprecated", "oc.dict.keys", "oc.dict.values", "oc.env", "oc.select"):
    OmegaConf.clear_resolver(resolver)


def read_values(path: Path, overrides: Iterable[str] = ()) -> tuple[Any, list[UserError]]:
    """Reads a recipe and applies `a.b=c` overrides.

    Returns:
        The plain values (None where a ${…} cannot be filled in), and what is wrong with overrides and ${…}.

    Raises:
        UserError: the file cannot be read as YAML.
    """
    config, errors = written_out(read(path)), []
    for text in overrides:
        key, equals, value = text.partition("=")
        try:
            if not equals or not all(key.split(".")):
                raise ValueError("it is not key=value")
            if len(re.split(r"[.\[]", key)) > MOST_DEPTH:
                raise ValueError(f"it is nested more than {MOST_DEPTH} deep")
            check(value)
            config = written_out(OmegaConf.merge(config, OmegaConf.from_dotlist([text])))
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, LookupError) as error:
            remedy = "Write key=value, e.g. training.epochs=3; the value is YAML."
            errors.append(UserError(text, f"cannot be applied ({one_line(error)})", remedy))
    try:
        return OmegaConf.to_container(config, resolve=True), errors
    except OmegaConfBaseException as error:
        return None, [*errors, UserError(str(path), one_line(error).rstrip("."), r"Write \${…} for a literal ${…}.")]


def written_out(config: Any) -> Any:
    """With `refine: vgmr` as `refine: {kind: vgmr}`: an override of another key of the section then leaves the kind."""
    for key in SHORT:
        if not OmegaConf.is_interpolation(config, key) and isinstance(config.get(key), str):
            config[key] = {"kind": config[key]}
    return config


def read(path: Path, example: str = EXAMPLE) -> Any:
    """The mapping in a YAML file.

    Args:
        example: where one is, for those whose file is none.

    Raises:
        UserError: there is none.
    """
    try:
        text = read_bounded(path, MOST_YAML, example).decode()
        check(text)
        values = OmegaConf.load(io.StringIO(text))
    except (yaml.YAMLError, ValueError, OmegaConfBaseException) as error:
        raise UserError(str(path), f"is not YAML ({one_line(error)})", "Correct the file at that place.") from None
    except OSError as error:
        raise UserError(str(path), f"cannot be read ({error.strerror or one_line(error)})", example) from None
    if not OmegaConf.is_dict(values):
        raise UserError(str(path), "is not a mapping of keys to values", example)
    return values


def check(text: str) -> None:
    """Refuses YAML that stands for too much.

    Raises:
        yaml.YAMLError: it does.
    """
    references = sum(len(re.findall(r"(?<!\\)(?:\\\\)*\$\{", scalar)) for scalar in check_yaml(text))
    if references > MOST_REFERENCES:
        raise yaml.YAMLError(f"it uses ${{…}} {references} times, at most {MOST_REFERENCES} are looked up")


def one_line(error: Exception) -> str:
    """The error's message without its line breaks."""
    return " ".join(str(error).split())


class _Quoting(yaml.SafeDumper):
    """Quotes text such as 1e5 too, which OmegaConf takes for a number and PyYAML does not."""


_Quoting.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def write_values(values: Any, path: Path) -> None:
    """Writes plain values so that `read_values` reads back the same."""
    plain = escaped(values)
    text = yaml.dump(plain, Dumper=_Quoting, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(text) != plain:  # some characters count as line breaks: written as escapes
        text = yaml.dump(plain, Dumper=_Quoting, sort_keys=False)
    path.write_text(text, encoding="utf-8")


def escaped(value: Any) -> Any:
    """Nested values whose strings OmegaConf reads back literally: ${…} would be looked up."""
    if isinstance(value, dict):
        return {key: escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [escaped(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
