from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from dist_train.kinds import OfKind
from dist_train.recipe import Recipe, load_recipe, validate, write_recipe
from dist_train.recipe_file import SHORT
from sharding.errors import UserError, UserErrors
from tests import tiny


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The tiny recipe as a file."""
    file = tmp_path / "recipe.yaml"
    write_recipe(tiny.recipe(Path("shards")), file)
    return file


def errors_of(path: Path, *overrides: str) -> dict[str, UserError]:
    """What is wrong, by key."""
    with pytest.raises(UserErrors) as caught:
        load_recipe(path, overrides)
    found = {error.where: error for error in caught.value.errors}
    assert len(found) == len(caught.value.errors), "the same key twice"
    for error in found.values():
        assert "\n" not in str(error) and error.problem and error.remedy
    return found


def test_all_problems_are_told_at_once(path: Path) -> None:
    """Unknown keys, wrong types, values out of range, conflicts and malformed overrides."""
    found = errors_of(
        path, "foo", "seed=-1", "precision=fp16", "training.epoch=3", "training.epochs=many", "optimizer.betas=[0.9,1]",
        "loss.rnc=.nan", "data.path=null", "fusion=7", "text.tuning=frozen", "audio.pretrained=there", "zero.stage=4",
    )  # fmt: skip
    assert found.keys() == {
        "foo", "seed", "precision", "training.epoch", "training.epochs", "optimizer.betas", "loss.rnc", "data.path",
        "fusion", "text.tuning", "audio", "zero.stage",
    }  # fmt: skip
    assert found["training.epoch"].remedy == "Did you mean training.epochs?"
    assert found["precision"].remedy == "Write bf16 or fp32."
    assert found["zero.stage"].remedy == "Write 0, 1, 2 or 3."
    assert found["optimizer.betas"].remedy == "Write a list of 2 values, each a number, at least 0 and below 1."
    assert found["training.epochs"].problem == 'cannot be "many"'
    assert found["training.epochs"].remedy == "Write a whole number, at least 1."
    assert found["data.path"].problem == "is missing"
    assert found["fusion"].remedy == "Write a mapping of keys to values."


@pytest.mark.parametrize(
    ("override", "key", "remedy"),
    [
        ("training.validate_every=0", "training.validate_every", "Write a whole number, at least 1, or epoch."),
        ("training.validate_every=never", "training.validate_every", "Write a whole number, at least 1, or epoch."),
        (
            "audio.lora.target_modules=[]",
            "audio.lora.target_modules",
            "Write a list of at least 1 values, each text, or null.",
        ),
        (
            "audio.lora.target_modules=[1]",
            "audio.lora.target_modules",
            "Write a list of at least 1 values, each text, or null.",
        ),
        (
            "optimizer.betas=[0.9]",
            "optimizer.betas",
            "Write a list of 2 values, each a number, at least 0 and below 1.",
        ),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate", "Write a number, above 0."),
        ("simulation.prompt=3", "simulation.prompt", "Write text."),
        ("simulation.rollout=beam", "simulation.rollout", "Write generate, cached, prefix, features or none."),
        ("imagination.enabled=perhaps", "imagination.enabled", "Write true or false."),
        ("training.patience=0", "training.patience", "Write a whole number, at least 1, or null."),
        ("epochs=3", "epochs", "Did you mean training.epochs?"),
        ("audio.lora.rnak=3", "audio.lora.rnak", "Did you mean audio.lora.rank?"),
        ("dta.path=x", "dta", "Did you mean data?"),
        ("text.config.hiden_size=8", "text.config.hiden_size", "Did you mean text.config.hidden_size?"),
    ],
)
def test_the_remedy_says_what_to_write(override: str, key: str, remedy: str, path: Path) -> None:
    found = errors_of(path, override)
    assert found.keys() == {key}
    assert found[key].remedy == remedy


@pytest.mark.parametrize("value", ["true", "false"])
def test_no_number_can_be_written_as_true_or_false(value: str) -> None:
    """pydantic reads them as 1 and 0."""

    def numbers(model: type[BaseModel], place: str) -> Iterator[tuple[str, int]]:
        """Keys of numbers, and how many values each has."""
        for name, field in model.model_fields.items():
            kind: Any = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from numbers(kind, f"{place}{name}.")
            elif {int, float} & {kind, *get_args(kind), *(type(one) for one in get_args(kind))}:
                yield place + name, 1
            elif get_origin(kind) is tuple:
                yield place + name, len(get_args(kind))

    found = dict(numbers(Recipe, ""))
    assert {"seed", "training.epochs", "zero.stage", "training.patience", "optimizer.betas"} <= found.keys()
    values: dict[str, Any] = {"audio": {"config": {"x": True}}, "imagination": {"enabled": True}}
    for key, count in found.items():
        *sections, name = key.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = yaml.safe_load(value if count == 1 else f"[{', '.join([value] * count)}]")
    with pytest.raises(UserErrors) as caught:
        validate(values)
    refused = {error.where for error in caught.value.errors if error.problem == f"cannot be {value}"}
    assert refused == found.keys()


def test_an_unlike_key_is_answered_with_those_there_are(path: Path) -> None:
    remedy = errors_of(path, "schedule.qqq=1")["schedule.qqq"].remedy
    assert remedy == "Known here: name, warmup_steps."


@pytest.mark.parametrize(
    "override",
    [
        "text.config.hidden_size=abc",
        "text.config.hidden_size=15",
        "text.config.hidden_act=abc",
        "text.config.num_key_value_heads=3",
        "audio.config.conv_dim=[4]",
        "audio.config.num_attention_heads=3",
        "audio.config.num_conv_pos_embedding_groups=5",
    ],
)
def test_a_configuration_that_makes_no_model_is_refused_before_anything_is_built(override: str, path: Path) -> None:
    (error,) = errors_of(path, override).values()
    assert error.where in ("text.config", "audio.config")
    assert "Config" in error.remedy


def test_conflicts(path: Path) -> None:
    for override in ("text.config=null", "text.pretrained=x"):
        assert errors_of(path, override)["text"].problem == "needs exactly one of pretrained and config"
    assert errors_of(path, "audio.config=null").keys() == {"audio"}
    load_recipe(path, ["audio.config=null", "audio.input=features"])
    for rollout in ("none", "features"):
        unread = ["text.input=features", f"simulation.rollout={rollout}"]
        assert errors_of(path, *unread)["text.config"].remedy == "Leave it out."
        load_recipe(path, [*unread, "text.config=null"])
    assert "text.input: features" in errors_of(path, "simulation.rollout=features")["simulation.rollout"].remedy
    assert "full" in errors_of(path, "text.tuning=frozen")["text.tuning"].remedy
    for override in ("text.input=features", "simulation.rollout=none"):
        assert "loss.asr: 0" in errors_of(path, override, "loss.asr=0.1")["loss.asr"].remedy
    nothing = [f"loss.{name}=0" for name in ("mse_complete", "mse_missing", "mkd1", "mkd2", "rs", "rnc")]
    assert "weight 0" in errors_of(path, *nothing)["loss"].problem
    assert "transcription" in errors_of(path, *nothing, "loss.asr=1")["training.select_on"].remedy
    load_recipe(path, [*nothing, "loss.asr=1", "training.select_on=transcription"])
    assert "loss.asr" in errors_of(path, "training.select_on=transcription")["training.select_on"].problem
    unread = ["text.config=null", "text.input=features", "simulation.rollout=none", "simulation.projector=x"]
    assert errors_of(path, *unread).keys() == {"simulation.projector"}


def test_a_wrong_value_is_not_followed_by_a_conflict_with_its_default(path: Path) -> None:
    assert errors_of(path, "audio.config=3").keys() == {"audio.config"}
    assert errors_of(path, "text.config=3", "seed=a").keys() == {"text.config", "seed"}


def test_wrong_values_are_left_untouched() -> None:
    values: dict[str, Any] = {"data": {"path": "x"}, "audio": {"lora": {"rank": 0, "alpha": 3}}, "bar": 1}
    before = json.dumps(values)
    with pytest.raises(UserErrors):
        validate(values)
    assert json.dumps(values) == before


def test_overrides(path: Path) -> None:
    made = load_recipe(
        path,
        [
            "training.epochs=7",
            "optimizer.learning_rate=3e-5",
            "optimizer.betas=[0.5,0.75]",
            "training.patience=null",
            "audio.lora.target_modules=[output_dense,a.b]",
            "data.path=a=b/c d",
            'simulation.prompt="Say: {x} = [y]"',
            "imagination.enabled=false",
            "text.config.num_hidden_layers=5",
            "text.config.rms_norm_eps=0.5",
            "seed=1",
            "seed=2",
        ],
    )
    assert made.training.epochs == 7 and made.optimizer.learning_rate == 3e-5
    assert made.optimizer.betas == (0.5, 0.75) and made.training.patience is None
    assert made.audio.lora.target_modules == ["output_dense", "a.b"]
    assert made.data.path == "a=b/c d" and made.simulation.prompt == "Say: {x} = [y]"
    assert made.imagination.enabled is False and made.seed == 2
    assert made.text.config["num_hidden_layers"] == 5 and made.text.config["hidden_size"] == 16  # type: ignore[index]
    unchanged = load_recipe(path)
    assert unchanged.data.batch == made.data.batch and unchanged.seed == 3


def test_every_section_with_a_kind_may_be_one_word() -> None:
    kinds = {name: field.annotation for name, field in Recipe.model_fields.items()}
    found = {name for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, OfKind)}
    assert found == set(SHORT)


@pytest.mark.parametrize("words", [["refine=vgmr", "refine.alpha=0.25"], ["refine={kind: vgmr, alpha: 0.25}"]])
def test_a_kind_in_one_word_outlives_other_overrides(words: list[str], path: Path) -> None:
    made = load_recipe(path, [*words, "imagination=promma", "imagination.levels=1"])
    assert (made.refine.kind, made.refine.alpha) == ("vgmr", 0.25)
    assert (made.imagination.kind, made.imagination.levels) == ("promma", 1)
    task = load_recipe(path, ["task=classification", "task.classes=[low,high]", "task.thresholds=[0]"]).task
    assert task.classifies and task.classes == ["low", "high"]


@pytest.mark.parametrize("flow", ["complete", "missing"])
def test_weights_of_the_other_task_are_refused(flow: str, path: Path) -> None:
    classes = ["task=classification", "task.classes=[low,high]"]
    assert f"loss.mse_{flow}" in errors_of(path, *classes, f"loss.mse_{flow}=0")
    assert f"loss.ce_{flow}" in errors_of(path, f"loss.ce_{flow}=1")


@pytest.mark.parametrize(
    "override", ["seed", "", "=3", ".seed=3", "training..epochs=3", "seed=[", "seed={a", "seed=a: b: c"]
)
def test_malformed_overrides(override: str, path: Path) -> None:
    found = errors_of(path, override, "training.epochs=0")
    assert found.keys() == {override, "training.epochs"}
    assert "key=value" in found[override].remedy


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=30))
def test_no_override_makes_a_traceback(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text("data: {path: x}\naudio: {pretrained: x}\ntext: {pretrained: x}\n")
        for override in (text, f"simulation.prompt={text}", f"audio.lora.rank={text}", f"{text}=1"):
            with contextlib.suppress(UserErrors):
                load_recipe(file, [override])


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"seed: 1\nseed: 2", "duplicate key seed"),
        (b"seed: [1", "is not YAML"),
        (b"seed: \xff\xfe", "is not YAML.*utf-8"),
        (b"\x00", "is not YAML"),
        (b"- seed\n- data", "not a mapping"),
        (b"42", "cannot be read"),
        (b"seed: !!python/object/apply:os.getcwd []", "is not YAML"),
        (b"\tseed: 1", "is not YAML"),
        (b"data: {path: '${nothing.here}'}", "nothing.here"),
    ],
)
def test_files_that_hold_no_recipe(content: bytes, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    with pytest.raises((UserError, UserErrors), match=problem) as caught:
        load_recipe(file)
    assert "recipe.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "absent.yaml"):
        with pytest.raises(UserError, match=f"{file.name}.*cannot be read"):
            load_recipe(file)


def test_an_empty_file_lacks_what_has_no_default(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    for content in ("", "null", "1: 2", "training: {epochs: 2}"):
        file.write_text(content)
        found = errors_of(file)
        assert "Directory of shards" in found["data.path"].remedy
        assert {"audio", "text"} <= found.keys()
        assert found["data.path"].problem == "is missing"
    file.write_text("data:\ntraining:\n")
    assert {"data", "training"} <= errors_of(file).keys()


@settings(deadline=None, max_examples=50)
@example(prompt="", folder="\x85", rate=1.0, seed=0)  # a line break to YAML
@given(st.text(max_size=20), st.text(max_size=20), st.floats(1e-12, 1e3), st.integers(0, 2**63 - 1))
def test_a_written_recipe_reads_back_the_same(prompt: str, folder: str, rate: float, seed: int) -> None:
    made = validate(
        {
            "seed": seed,
            "data": {"path": folder},
            "simulation": {"prompt": f"${{{prompt}}}\\${{a}} {prompt}"},
            "optimizer": {"learning_rate": rate, "betas": [0.1, 0.2]},
            "audio": {"pretrained": prompt, "lora": {"target_modules": ["null", "3", "yes", folder]}},
            "text": {"pretrained": "x"},
        }
    )
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "recipe.yaml"
        write_recipe(made, file)
        assert load_recipe(file) == made
        assert yaml.safe_load(file.read_text("utf-8")).keys() == Recipe.model_fields.keys()


def test_configurations_read_back_the_same(path: Path) -> None:
    assert load_recipe(path) == tiny.recipe(Path("shards"))


def test_every_field_is_described_and_in_the_schema() -> None:
    schema = Recipe.model_json_schema()
    json.dumps(schema)

    def check(model: type[BaseModel], place: str) -> None:
        for name, field in model.model_fields.items():
            kind: Any = field.annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                assert kind.__name__ in schema["$defs"]
                assert kind.__doc__ and kind.model_config["extra"] == "forbid"
                check(kind, f"{place}{name}.")
            else:
                assert field.description and field.description.endswith("."), place + name

    check(Recipe, "")


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    "name", sorted(str(f.relative_to(RECIPES)) for at in ("*.yaml", "mosei/*.yaml") for f in RECIPES.glob(at))
)
def test_the_recipes_of_the_repository_are_valid(name: str) -> None:
    load_recipe(RECIPES / name)
