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


MODELS = """## Encoders and language models

`audio.pretrained` and `audio.config.model_type` (default `wavlm`). A clip's states are those of transformers' model run
on it alone, whatever else is in the batch; `tests/dist_train/test_backbones.py` compares them, and trains each kind in
ZeRO-2 and ZeRO-3 with equal losses.

| `model_type` | works | attention | to know |
|---|---|---|---|
| wavlm | large and base | own (`dist_train/wavlm.py`) | |
| hubert | large and base | transformers' | not with `conv_pos_batch_norm` |
| wav2vec2 | large and base | transformers' | |
| whisper | the encoder alone | transformers' | `audio.max_seconds` at most 30; log-mel in the model |

- Base models normalise over time (`feat_extract_norm: group`): here over each clip's own frames, not over its padding.
- Whether the waveform gets zero mean and unit variance is what `preprocessor_config.json` says (`do_normalize`; without
  the file: it does).
- Whisper hears a clip as long as it is, without 30 s of padding; what is behind its end is hidden from attention. A
  clip of 30 s has the stock encoder's states. Shorter ones do not: the stock encoder also attends to the silence.
- Layer drop and spec-augment are off, the mask embedding and Whisper's positions are frozen.
- `dist-train convert` knows WavLM's weights only. Other encoders (wav2vec2-conformer, SEW, …) are refused.

`text.pretrained` and `text.config.model_type` (default `llama`): any causal language model of transformers that gives
the same states in the packed pass as its own eager attention gives clip by clip. Before it is loaded a small model of
its configuration (two layers or one of each kind, windows of 3) is tried; if states or logits differ, it is refused.

| | `model_type` |
|---|---|
| compared in float64, trained in ZeRO-2 and ZeRO-3 | llama, qwen2, qwen3, mistral, gemma, gemma2, gemma3_text |
| compared in float64 | granite |
| pass the trial | apertus, arcee, biogpt, cohere, cohere2, exaone4, glm, glm4, gpt_neox, helium, \
ministral, mixtral, olmo, olmo2, olmo3, olmoe, opt, persimmon, phi, phi3, phimoe, \
qwen2_moe, qwen3_moe, seed_oss, smollm3, starcoder2 |
| refused by it | bloom, codegen, falcon, gpt2, gptj, gpt_oss, mpt, stablelm, xglm |
| refused by their configuration | encoder-decoders, models of several modalities, \
layers of linear or chunked attention or convolution |

- Sliding windows are kept where a row is longer, also by the kernels of a GPU (flash-attn's or torch's; not run here).
- Soft-capped scores (Gemma 2) have no kernel here: each layer keeps the weights of its groups, L × L per head.
- Positions that end (learned ones) or hang on the longest row (`dynamic`, `longrope`) limit the length of a row.
- A tokenizer without BOS (Qwen): transcripts begin with EOS, the prompt with nothing. One without EOS is refused.
- Mixtures of experts pass the trial in evaluation mode; their training is not shown, and has no balancing loss.
- Planned arithmetic counts whole triangles where a GPU's kernel would skip what is outside a sliding window.
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
    return HEAD + "\n".join(lines) + "\n\n" + MODELS


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
