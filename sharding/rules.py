"""Which settings work together: one table for the recipe's validator, docs/compatibility.md and the tests.

A combination that no rule names works: the tests train it on two ranks. What a rule refuses is tried there too, so that
a rule whose reason has gone (a library was repaired) is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args, get_type_hints

from sharding.errors import UserError

Verdict = Literal["refused", "needs_gpu"]


@dataclass(frozen=True)
class Case:
    """Settings of one pretrained part and of the run around it, as plain values."""

    tuning: Literal["frozen", "full", "lora", "dora", "vera"]
    quantisation: Literal["none", "int8", "nf4"] = "none"
    stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    optimizer: Literal["adam", "adamw", "adamw_8bit"] = "adamw"
    offload_optimizer: Literal["none", "cpu"] = "none"
    offload_parameters: Literal["none", "cpu"] = "none"
    activation_checkpointing: Literal[False, True] = False
    replicate_int8: Literal[False, True] = False


@dataclass(frozen=True)
class Rule:
    """What is said of all cases whose settings are among those of `when`.

    Args:
        verdict: `refused`; or `needs_gpu` for what runs on a CPU but has its use on a GPU only, so that nothing is
            claimed of it here.
        where: recipe key to change; {part} stands for text or audio.
        problem, remedy: for the user.
        evidence: how it is known, with versions.
    """

    name: str
    when: Mapping[str, tuple[Any, ...]]
    verdict: Verdict
    where: str
    problem: str
    remedy: str
    evidence: str

    def matches(self, case: Case) -> bool:
        """Whether the case has all the settings of the rule."""
        return all(getattr(case, name) in values for name, values in self.when.items())


RULES = (
    Rule(
        "fp16",
        {"precision": ("fp16",)},
        "refused",
        "precision",
        "is fp16, in which speech models with a language model overflow",
        "Write precision: bf16",
        "DeepSpeed 0.19.8: `Type fp16 is not supported on your device` on a CPU; a loss that was NaN until fp16 was "
        "turned off (X-LANCE/SLAM-LLM#125)",
    ),
    Rule(
        "quantised weights cannot be trained",
        {"tuning": ("full",), "quantisation": ("int8", "nf4")},
        "refused",
        "{part}.tuning",
        "is full, but integer weights have no gradient",
        "Write {part}.tuning: lora, or {part}.quantisation: none",
        "torch: `only Tensors of floating point dtype can require gradients`",
    ),
    Rule(
        "DoRA on int8",
        {"tuning": ("dora",), "quantisation": ("int8",)},
        "refused",
        "{part}.quantisation",
        "is int8, which DoRA cannot read back: PEFT loses the scales of the int8 weights after the first pass",
        "Write {part}.quantisation: nf4 (stages 0 to 2), or {part}.tuning: lora",
        "PEFT 0.21.2 with bitsandbytes 0.50.2 on a CPU: `'NoneType' object has no attribute 'unsqueeze'`; not tried on "
        "a GPU",
    ),
    Rule(
        "DoRA on nf4 in shards",
        {"tuning": ("dora",), "quantisation": ("nf4",), "stage": (3,)},
        "refused",
        "zero.stage",
        "is 3, where DoRA cannot gather the 4-bit weights it needs the length of",
        "Write zero.stage: 2, or {part}.tuning: lora",
        "PEFT 0.21.2 with DeepSpeed 0.19.8: `'Params4bit' object has no attribute 'ds_status'`",
    ),
    Rule(
        "int8 in shards",
        {"quantisation": ("int8",), "stage": (3,), "replicate_int8": (False,)},
        "refused",
        "{part}.quantisation",
        "is int8 under zero.stage 3, where every rank keeps a whole copy of the int8 weights besides its shard: more "
        "memory than stage 2, and more traffic",
        "Write zero.stage: 2, {part}.quantisation: nf4, or zero.replicate_int8: true to have it so",
        "bitsandbytes 0.50.2 keeps the matrix in `Linear8bitLt.state.CB`",
    ),
    Rule(
        "optimizer offload without shards",
        {"offload_optimizer": ("cpu",), "stage": (0,)},
        "refused",
        "zero.offload_optimizer",
        "is cpu, which DeepSpeed does in stages 1 to 3 only",
        "Write zero.stage: 2",
        "DeepSpeed 0.19.8 ignores it in stage 0",
    ),
    Rule(
        "parameter offload without sharded parameters",
        {"offload_parameters": ("cpu",), "stage": (0, 1, 2)},
        "refused",
        "zero.offload_parameters",
        "is cpu, which DeepSpeed does in stage 3 only",
        "Write zero.stage: 3",
        "DeepSpeed 0.19.8 ignores it below stage 3",
    ),
    Rule(
        "what quantisation saves",
        {"quantisation": ("int8", "nf4")},
        "needs_gpu",
        "{part}.quantisation",
        "trains on a CPU too; the memory and time of bitsandbytes' GPU kernels are not shown here",
        "Expect it slower than bf16 on GPUs of the H100 class: use it where bf16 does not fit",
        "bitsandbytes 0.45 on an H100, Llama-3.1-8B, tokens/s by its own benchmark: bf16 1228, nf4 659, int8 371, "
        "with threshold 0 586",
    ),
    Rule(
        "nf4 of other widths",
        {"quantisation": ("nf4",)},
        "needs_gpu",
        "{part}.quantisation",
        "is refused on a CPU for layers whose inputs are no multiple of 64, which the loading finds",
        "Write {part}.quantisation: int8",
        "bitsandbytes 0.50.2 quantises a matrix in blocks of 64 over its rows, and reads it back on a CPU in blocks "
        "within each row: weights are wrong by 70 to 100 %, without an error",
    ),
    Rule(
        "what offloading frees",
        {"offload_optimizer": ("cpu",)},
        "needs_gpu",
        "zero.offload_optimizer",
        "runs where the model is on a CPU anyhow; the GPU memory it frees and the time it costs are not shown here",
        "Use it where masters and moments do not fit",
        "the path only was run",
    ),
    Rule(
        "what offloading parameters frees",
        {"offload_parameters": ("cpu",), "stage": (3,)},
        "needs_gpu",
        "zero.offload_parameters",
        "runs where the model is on a CPU anyhow; the GPU memory it frees and the time it costs are not shown here",
        "Use it where the shards do not fit",
        "the path only was run",
    ),
)


def works(case: Case) -> bool:
    """Whether no rule refuses the case."""
    return not any(rule.verdict == "refused" and rule.matches(case) for rule in RULES)


def incompatible(cases: Mapping[str, Case]) -> list[UserError]:
    """What the rules refuse of a recipe, each once.

    Args:
        cases: by part, `text` and `audio`.
    """
    found = {}
    for part, case in cases.items():
        for rule in RULES:
            if rule.verdict == "refused" and rule.matches(case):
                error = UserError(rule.where.format(part=part), rule.problem, rule.remedy.format(part=part))
                found[str(error)] = error
    return list(found.values())


def domains() -> dict[str, tuple[Any, ...]]:
    """The values of each setting of a case."""
    return {name: get_args(kind) for name, kind in get_type_hints(Case).items()}


def all_cases() -> Iterator[Case]:
    """Every combination."""
    for values in product(*domains().values()):
        yield Case(*values)
