"""docs/compatibility.md from the rules: `python -m tools.compatibility` writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sharding.rules import RULES, Case, Rule, domains

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"

HEAD = """# What works with what

Written by `python -m tools.compatibility` from the rules in `sharding/rules.py`; a test keeps it up to date.

The recipe's validator refuses what is refused here, before anything is loaded. Everything else works:
`tests/sharding/test_rules.py` trains it for some steps in two processes on a CPU (gloo), with a tiny WavLM and Llama in
DeepSpeed's engine, and wants a loss that falls, a gradient for every trainable, and trainables that move. Each cell of
the table below is such a run, and each pair of any two settings is in at least one. Nothing here was run on a GPU; what
only a GPU can show is said at the end.

## Adapter, quantisation and ZeRO stage

Tuning and quantisation of `text` or `audio`; a number names the rule that refuses the cell.

"""


def page() -> str:
    """The page."""
    refused = [rule for rule in RULES if rule.verdict == "refused"]
    numbers = {rule.name: number for number, rule in enumerate(refused, 1)}
    lines = [*matrix(numbers), "", "## Other settings", "", *others(), "", "## Refused", ""]
    for rule in refused:
        lines += [
            f"{numbers[rule.name]}. **{rule.name}** ({condition(rule)}): {plain(rule.where)} {rule.problem}. "
            f"{plain(rule.remedy)}. *Known from:* {rule.evidence}."
        ]
    lines += ["", "## Needs a GPU to be shown", ""]
    for rule in RULES:
        if rule.verdict == "needs_gpu":
            lines += [f"- **{rule.name}** ({condition(rule)}): {rule.problem}. {rule.remedy}. {rule.evidence}."]
    return HEAD + "\n".join(lines) + "\n"


def matrix(numbers: dict[str, int]) -> Iterator[str]:
    """Tuning and quantisation against stages."""
    found = domains()
    yield "| tuning | quantisation | " + " | ".join(f"stage {stage}" for stage in found["stage"]) + " |"
    yield "|---" * (len(found["stage"]) + 2) + "|"
    for tuning in found["tuning"]:
        for quantisation in found["quantisation"]:
            cells = []
            for stage in found["stage"]:
                case = Case(tuning, quantisation, stage)
                against = [
                    str(numbers[rule.name]) for rule in RULES if rule.verdict == "refused" and rule.matches(case)
                ]
                cells.append(f"no ({', '.join(against)})" if against else "yes")
            yield f"| {tuning} | {quantisation} | {' | '.join(cells)} |"


def others() -> Iterator[str]:
    """The settings that the matrix leaves out."""
    yield "| setting | values |"
    yield "|---|---|"
    for name, values in domains().items():
        if name not in ("tuning", "quantisation", "stage"):
            yield f"| {name} | {', '.join(map(spelled, values))} |"


def condition(rule: Rule) -> str:
    """When a rule holds."""
    return ", ".join(f"{name} {' or '.join(map(spelled, values))}" for name, values in rule.when.items())


def spelled(value: object) -> str:
    """A value as in YAML."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def plain(text: str) -> str:
    """A key or remedy without its part."""
    return text.replace("{part}.", "")


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
