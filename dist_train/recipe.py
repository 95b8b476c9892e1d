"""A recipe: YAML → settings models that live beside the code they configure. All problems are reported at once."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from dist_train.adapters import TuningSettings
from dist_train.audio import AudioSettings
from dist_train.batch import DataSettings
from dist_train.fusion import FusionSettings
from dist_train.imagination import ImaginationSettings
from dist_train.llm import SimulationSettings, TextSettings
from dist_train.losses import LossSettings
from dist_train.missing import Missing
from dist_train.optimizer import OptimizerSettings, ScheduleSettings
from dist_train.recipe_conflicts import conflicts
from dist_train.recipe_file import read_values, write_values
from dist_train.refine import RefineSettings
from dist_train.task import TaskSettings
from sharding.errors import UserError, UserErrors
from sharding.rules import Case, domains
from sharding.saver import CheckpointSettings
from sharding.zero import ZeroSettings

SHOWN_CHARACTERS = 60  # of a wrong value in a message
UNKNOWN = ("extra_forbidden", "invalid_key")  # pydantic's names of errors about a key, not a value


class TrainingSettings(BaseModel):
    """How long, how often to look, when to stop."""

    model_config = ConfigDict(extra="forbid")

    epochs: int = Field(25, ge=1, description="Passes over the training split.")
    accumulation: int = Field(
        1, ge=1, description="Micro-steps per optimizer step; with `data.budget`, the least number."
    )
    accumulated_loss: Literal["exact", "approximate"] = Field(
        "exact",
        description="`exact`: the losses compare the clips of all micro-steps; every micro-step but one then runs "
        "forward twice. `approximate`: RMSE and RNC compare the clips of one micro-step over all ranks.",
    )
    check_agreement_steps: int = Field(
        3, ge=0, description="First optimizer steps in which the ranks compare which modules they ran."
    )
    profile_step: int | None = Field(
        None,
        ge=1,
        description="Optimizer step of which rank 0 writes a profiler trace, trace_step_N.json.gz (for Perfetto or "
        "chrome://tracing). Default: none.",
    )
    watchdog_seconds: float | None = Field(
        600,
        ge=5,
        allow_inf_nan=False,
        description="A rank that begins nothing new for so long ends the run (exit code 75): it is named, and all "
        "ranks write their stacks to logs/. Loading may take three times as long. null: never.",
    )
    validate_every: Annotated[int, Field(ge=1)] | Literal["epoch"] = Field(
        "epoch", description="Validate after each epoch, or every N steps."
    )
    select_on: Literal["mean", "complete", "missing", "transcription"] = Field(
        "mean",
        description="What selects the best checkpoint on the validation split: the MAE of a flow (macro-F1 in "
        "classification), the `mean` of both, or `transcription`, nats per token of the transcript given the audio "
        "(needs `loss.asr`).",
    )
    patience: int | None = Field(
        None, ge=1, description="Stop after this many validations without a better one. Default: never."
    )


class Widths(BaseModel):
    """Feature widths, filled in from the dataset when a run starts."""

    model_config = ConfigDict(extra="forbid")

    audio: int = Field(1, ge=1, description="Width of KEY.audio.npy.")
    text: int = Field(1, ge=1, description="Width of KEY.text.npy.")
    simulated: int = Field(1, ge=1, description="Width of KEY.simulated.npy.")
    vision: int = Field(1, ge=1, description="Width of KEY.vision.npy.")


class Recipe(BaseModel):
    """Everything that decides a run, except how many ranks do it."""

    model_config = ConfigDict(extra="forbid")

    seed: int = Field(0, ge=0, lt=2**63, description="Seed of weights, data order and dropout.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Arithmetic; masters, losses and softmax over time are fp32."
    )
    task: TaskSettings = Field(default_factory=TaskSettings)
    data: DataSettings = Field(default_factory=DataSettings)
    widths: Widths = Field(default_factory=Widths, description="Filled in from the dataset.")
    audio: AudioSettings = Field(default_factory=AudioSettings)
    text: TextSettings = Field(default_factory=TextSettings)
    simulation: SimulationSettings = Field(default_factory=SimulationSettings)
    missing: Missing = Field(
        "text",
        description="What the missing flow does without: the same modality of every clip, or `random`: another one for "
        "each clip and epoch.",
    )
    imagination: ImaginationSettings = Field(default_factory=ImaginationSettings)
    refine: RefineSettings = Field(default_factory=RefineSettings)
    fusion: FusionSettings = Field(default_factory=FusionSettings)
    loss: LossSettings = Field(default_factory=LossSettings)
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = Field(default_factory=ScheduleSettings)
    training: TrainingSettings = Field(default_factory=TrainingSettings)
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    zero: ZeroSettings = Field(default_factory=ZeroSettings)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and the arithmetic."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    @property
    def reads_language_model(self) -> bool:
        """Whether a language model reads transcripts or imagines text; else all text comes as features, or none."""
        return self.text.input == "transcript" or self.simulation.imagines

    @property
    def compares_flows(self) -> bool:
        """Whether any loss trains the flows' predictions; without one only ASR trains (projector pre-training)."""
        return self.loss.compares_flows(self.task.classifies)

    def cases(self) -> dict[str, Case]:
        """Each pretrained part and the settings around it, as the compatibility rules see them."""
        parts: dict[str, TuningSettings] = {"text": self.text} if self.reads_language_model else {}
        if self.audio.input == "waveform":
            parts["audio"] = self.audio
        kept = ("tuning", "quantisation", "activation_checkpointing")
        around = {name: getattr(self.zero, name) for name in ZeroSettings.model_fields if name in domains()}
        return {
            name: Case(
                **{key: getattr(part, key) for key in kept},
                **around,
                precision=self.precision,
                optimizer=self.optimizer.name,
            )
            for name, part in parts.items()
        }


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Reads a recipe and applies `a.b=c` overrides.

    Raises:
        UserErrors: every problem of the recipe and the overrides, each naming the key, what is wrong and what to write.
        UserError: the file cannot be read as YAML.
    """
    values, errors = read_values(path, overrides)
    try:
        recipe = None if values is None else validate(values)
    except UserErrors as found:
        errors += found.errors
    if errors or recipe is None:
        raise UserErrors(errors)
    return recipe


def validate(values: dict[str, Any]) -> Recipe:
    """A Recipe of plain values, or UserErrors with all problems."""
    details, wrong = list(misplaced_booleans(values)), set()
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        details += error.errors()
    # An alternative of several reports once per alternative.
    errors = list({str(found): found for found in map(explain, details)}.values())
    if details:
        # What is wrong falls back to its default, so that conflicts among the rest are found in the same pass.
        places = [detail["loc"] if detail["type"] in UNKNOWN else locate(detail["loc"])[0] for detail in details]
        wrong = {locate(detail["loc"])[0][0] for detail in details if detail["type"] not in UNKNOWN}
        try:
            recipe = Recipe.model_validate(without(values, places))
        except ValidationError:
            raise UserErrors(errors) from None
    # A section with a wrong value may conflict with itself only because of the default put in its place.
    errors += [conflict for conflict in conflicts(recipe) if conflict.where.split(".")[0] not in wrong]
    if errors:
        raise UserErrors(errors)
    return recipe


def misplaced_booleans(value: Any, place: tuple[int | str, ...] = ()) -> Iterator[ErrorDetails]:
    """true and false where the recipe wants a number: pydantic would read them as 1 and 0."""
    inner: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from misplaced_booleans(part, (*place, key))
    if isinstance(value, bool) and {"integer", "number"} & kinds(locate(place)[1]):
        yield {"type": "boolean", "loc": place, "input": value, "msg": ""}


def kinds(schema: dict[str, Any]) -> set[str]:
    """JSON types that a schema allows, those of a list's values among them."""
    parts = [*schema.get("anyOf", []), *schema.get("prefixItems", []), schema.get("items", {})]
    return {schema.get("type", "")}.union(*map(kinds, filter(None, parts)))


def without(values: dict[str, Any], places: Iterable[Sequence[int | str]]) -> dict[str, Any]:
    """A copy of nested dicts less the named places; of one inside a list, less the list."""
    kept = copy.deepcopy(values)
    for place in places:
        inner: Any = kept
        for depth, key in enumerate(place):
            if not isinstance(inner, dict):
                break
            if depth == len(place) - 1 or isinstance(inner.get(key), list):
                inner.pop(key, None)
                break
            inner = inner.get(key)
    return kept


def explain(detail: ErrorDetails) -> UserError:
    """One pydantic error in the words of the recipe."""
    place, schema = locate(detail["loc"])
    key = ".".join(place)
    if detail["type"] in UNKNOWN:
        key = ".".join(map(str, detail["loc"]))
        return UserError(key, "is not a key of the recipe", nearest(str(detail["loc"][-1]), place, schema))
    if detail["type"] == "missing" and "prefixItems" not in schema:
        key = ".".join([*place, *schema.get("required", [])[:1]])  # of a section: what it cannot do without
        return UserError(key, "is missing", f"Write {key}: {locate(key.split('.'))[1]['description']}")
    shown = json.dumps(detail["input"], default=str, ensure_ascii=False)
    shown = shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}…"
    return UserError(key, f"cannot be {shown}", f"Write {expected(schema)}.")


@cache
def recipe_schema() -> dict[str, Any]:
    """JSON schema of recipes."""
    return Recipe.model_json_schema()


def locate(loc: Iterable[int | str]) -> tuple[list[str], dict[str, Any]]:
    """The key of the recipe that contains `loc` (pydantic also counts list items and alternatives), and its schema.

    An item of a list counts as a key by its number where it is a section, as in data.sources.0.path.
    """
    place: list[str] = []
    schema = recipe_schema()
    for part in loc:
        sections = [found for found in schema.get("anyOf", [schema]) if "$ref" in found.get("items", {})]
        if sections and str(part).isdigit():
            schema = sections[0]["items"]
        elif part in schema.get("properties", {}):
            schema = schema["properties"][part]
        else:
            break
        place.append(str(part))
        if "$ref" in schema:
            schema = recipe_schema()["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
    return place, schema


def nearest(name: str, place: list[str], schema: dict[str, Any]) -> str:
    """What an unknown key in the section at `place` may have meant: a neighbour, or one of that name elsewhere."""
    known = list(schema.get("properties", {}))
    near = [[*place, match] for match in difflib.get_close_matches(name, known, n=1)]
    elsewhere = [[section, name] for section in recipe_schema()["properties"] if locate([section, name])[0][1:]]
    for candidate in near + elsewhere:
        return f"Did you mean {'.'.join(candidate)}?"
    return f"Known here: {', '.join(known)}."


def expected(schema: dict[str, Any]) -> str:
    """The values that a JSON schema allows, in words."""
    if "anyOf" in schema:
        return ", or ".join(expected(part) for part in schema["anyOf"])
    if "const" in schema:
        return str(schema["const"])
    if "enum" in schema:
        *others, last = map(str, schema["enum"])
        return f"{', '.join(others)} or {last}"
    if "prefixItems" in schema:
        return f"a list of {len(schema['prefixItems'])} values, each {expected(schema['prefixItems'][0])}"
    if schema.get("type") == "array":
        return f"a list of at least {schema.get('minItems', 0)} values, each {expected(schema['items'])}"
    words = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
    words |= {"null": "null", "object": "a mapping of keys to values"}
    kind = schema.get("type", "object")  # a list's section is a reference
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = " and ".join(f"{sign} {schema[bound]:g}" for bound, sign in bounds.items() if bound in schema)
    return f"{words[kind]}, {limits}" if limits else words[kind]


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes a recipe, all defaults spelled out; it runs again as it is."""
    write_values(recipe.model_dump(mode="json"), path)
