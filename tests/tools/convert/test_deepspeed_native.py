"""DeepSpeed's own checkpoints: what is read of them, against the engines that wrote them."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from sharding.errors import UserError
from tests.tools.convert.work_deepspeed import CASES, SAVED_AT, Toy
from tools.convert import deepspeed_native, deepspeed_universal
from tools.convert.deepspeed_files import load
from tools.convert.held import Held

pytestmark = pytest.mark.slow  # the ranks that write the checkpoints take 20 s
TRAINED = {name: value for name, value in Toy(0).named_parameters() if value.requires_grad}
FROZEN = {"base.weight", "base.bias"}
NAMED = [name for name in CASES if name != "zero0_fp32"]


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("case", NAMED)
def test_masters_and_moments_are_those_of_the_engine(case: str, saved: Path) -> None:
    truth = torch.load(saved / case / "truth.pt")
    held = deepspeed_native.read(saved / case)
    assert held.state["adam_step"] == SAVED_AT + (case == "zero0_one_group_bf16")  # DeepSpeed's empty first step
    assert len(held.moments.shapes) == 2 * len(TRAINED) and len(truth) == 3 * len(TRAINED)
    for name, value in truth.items():
        tensors = held.weights if name in TRAINED else held.moments
        assert same(tensors.read(name), value), name
        assert tensors.shapes[name] == list(value.shape) and tensors.dtypes[name] == value.dtype


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_trained(case: str, saved: Path, seed: int) -> None:
    with warnings.catch_warnings(record=True):
        held = deepspeed_native.read(saved / case)
    model = Toy(seed)
    base = {name: value for name, value in model.state_dict().items() if name.startswith("base.")}
    assert set(held.weights.shapes) == TRAINED.keys() | {"steps", "centre"} | (
        set() if CASES[case].get("only") else base.keys()
    )
    assert same(held.weights.read("steps"), model.steps) and same(held.weights.read("centre"), model.centre)
    for name in base.keys() & held.weights.shapes.keys():
        expected = base[name].bfloat16() if CASES[case].get("bf16") else base[name]
        assert same(held.weights.read(name), expected) and held.weights.dtypes[name] == expected.dtype
    known = {"global_steps": SAVED_AT, "world_size": 2, "zero_stage": CASES[case]["stage"]}
    assert known.items() <= held.state.items()
    assert held.state["tied"] == {"out.weight": "words.weight"}
    assert held.state["client_state"] == {"epoch": 4, "best": [0.25, None]}
    if case in NAMED:
        assert set(held.state["frozen"]) == (set() if CASES[case].get("only") else FROZEN)


@pytest.mark.parametrize("case", ["zero2_fp32", "zero2_bf16", "zero3_fp32", "zero3_bf16"])
def test_weights_are_those_of_zero_to_fp32(case: str, saved: Path) -> None:
    held = deepspeed_native.read(saved / case)
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(saved / case))
    assert theirs.keys() == held.weights.shapes.keys() | held.state["tied"].keys()
    for name, value in theirs.items():
        assert torch.equal(held.weights.read(held.state["tied"].get(name, name)), value)


def test_without_names_only_weights_are_read_and_that_is_said(saved: Path) -> None:
    said: list[str] = []
    held = deepspeed_native.read(saved / "zero0_fp32", say=said.append)
    assert not held.moments.shapes and held.state["adam_step"] == 0 and "frozen" not in held.state
    assert len(said) == 1 and "optimizer's state" in said[0] and "left out" in said[0]
    truth = torch.load(saved / "zero0_fp32/truth.pt")
    assert all(torch.equal(held.weights.read(name), truth[name]) for name in TRAINED)


def test_root_and_tag_are_told_from_the_universal_format(saved: Path, converted: dict[str, Held]) -> None:
    root = saved / "zero2_fp32"
    for path, native, universal in (
        (root, True, False),
        (root / f"global_step{SAVED_AT}", True, False),
        (root / "universal", False, True),
        (root / "ours", False, True),
        (root / "portable", False, False),
        (root / "latest", False, False),
    ):
        assert (deepspeed_native.detect(path), deepspeed_universal.detect(path)) == (native, universal), path


MODEL, RANK0, RANK1 = "mp_rank_00_model_states.pt", *(f"zero_pp_rank_{n}_mp_rank_00_optim_states.pt" for n in (0, 1))
RANK2, MODEL3_0, MODEL3_1 = RANK1.replace("_1_", "_2_"), "zero_pp_rank_0_" + MODEL, "zero_pp_rank_1_" + MODEL
STATE, GROUPS = "optimizer_state_dict", "single_partition_of_fp32_groups"
Damage = Callable[[Path], object]


class Foreign:
    """A class of the user's own, as some put into client_state."""


def gone(*names: str) -> Damage:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def cut(name: str) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size * 2 // 3)


def other(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def copied(name: str, to: str) -> Damage:
    return lambda folder: shutil.copy(folder / name, folder / to)


def put(value: Any, name: str, *keys: Any) -> Damage:
    """Puts a value into a file, in the place that the keys lead to; None takes away what is there."""

    def damage(folder: Path) -> None:
        content = torch.load(folder / name, weights_only=False)
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        if value is None:
            del inner[keys[-1]]
        else:
            inner[keys[-1]] = value
        torch.save(content, folder / name)

    return damage


NINE = torch.zeros(9)
ADAM = ("base_optimizer_state", "state", 0, "step")
BAD: dict[str, tuple[str, Damage, str, str]] = {
    "no model file": ("zero2_fp32", gone(MODEL), f"global_step{SAVED_AT}", "holds no"),
    "a rank's file is gone": ("zero2_fp32", gone(RANK1), RANK1, "missing: 2 ranks wrote"),
    "all of them are gone": ("zero2_fp32", gone(RANK0, RANK1), RANK0, "missing"),
    "a rank's model file is gone": ("zero3_fp32", gone(MODEL3_1), MODEL3_1, "missing"),
    "the first model file is gone": ("zero3_fp32", gone(MODEL3_0), MODEL3_0, "missing"),
    "a rank too many": ("zero2_fp32", copied(RANK1, RANK2), RANK2, "too many"),
    "cut off": ("zero2_fp32", cut(RANK0), RANK0, "cannot be read"),
    "model file cut off": ("zero3_fp32", cut(MODEL3_1), MODEL3_1, "cannot be read"),
    "empty": ("zero2_fp32", other(RANK0, b""), RANK0, "cannot be read"),
    "no pickle": ("zero2_fp32", other(MODEL, b"<html>not found</html>"), MODEL, "cannot be read"),
    "foreign class": ("zero2_fp32", put(Foreign(), MODEL, "mine"), MODEL, "test_deepspeed_native.Foreign"),
    "foreign function": ("zero2_fp32", put(shutil.rmtree, RANK0, "mine"), RANK0, "shutil.rmtree"),
    "other world": ("zero2_fp32", put([3, 3], RANK1, STATE, "partition_count"), RANK1, "by 3 ranks"),
    "split model": ("zero2_fp32", copied(MODEL, "mp_rank_01_model_states.pt"), "mp_rank_01", "tensor, pipeline or"),
    "no optimizer": ("zero2_fp32", put(None, RANK0, STATE), RANK0, "not laid out"),
    "a list": ("zero2_fp32", lambda folder: torch.save([1], folder / MODEL), MODEL, "not laid out"),
    "a short partition": ("zero2_fp32", put(NINE, RANK1, STATE, GROUPS, 0), RANK1, "holds 9 elements"),
    "a short one of stage 3": ("zero3_fp32", put(NINE, RANK0, STATE, "fp32_flat_groups", 1), RANK0, "holds 9 elements"),
    "a part is nowhere": (
        "zero2_fp32", put(None, RANK1, STATE, "param_slice_mappings", 0, "up.weight"), RANK0, "0 elements of up.weight"
    ),
    "steps differ": ("zero2_fp32", put(torch.tensor(9.0), RANK1, STATE, *ADAM), RANK1, "9 times, others 3"),
    "tag leads elsewhere": (
        "zero2_fp32", lambda folder: (folder.parent / "latest").write_text("../x"), "latest", "no such folder"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints_are_refused_by_name(name: str, saved: Path, tmp_path: Path) -> None:
    case, damage, where, problem = BAD[name]
    tag = f"global_step{SAVED_AT}"
    shutil.copytree(saved / case / tag, tmp_path / tag)
    (tmp_path / "latest").write_text(tag)
    damage(tmp_path / tag)
    with pytest.raises(UserError) as error:
        deepspeed_native.read(tmp_path)
    assert where in str(error.value) and problem in str(error.value), str(error.value)


def test_nothing_runs_while_a_pickle_is_looked_at(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"a": Runs()}, tmp_path / "file.pt")
    with pytest.raises(UserError, match="would run code"):
        load(tmp_path / "file.pt")
    assert not (tmp_path / "ran").exists()


def test_optimizers_of_other_kinds_are_left_out_and_that_is_said(saved: Path, tmp_path: Path) -> None:
    tag = f"global_step{SAVED_AT}"
    shutil.copytree(saved / "zero2_fp32" / tag, tmp_path / tag)
    for name in (RANK0, RANK1):
        content = torch.load(tmp_path / tag / name, weights_only=False)
        for state in content[STATE]["base_optimizer_state"]["state"].values():
            state["momentum_buffer"] = state.pop("exp_avg")
            del state["exp_avg_sq"]
        torch.save(content, tmp_path / tag / name)
    said: list[str] = []
    held = deepspeed_native.read(tmp_path / tag, say=said.append)
    assert not held.moments.shapes and held.state["adam_step"] == 0 and held.weights.shapes
    assert any("momentum_buffer" in line for line in said)
