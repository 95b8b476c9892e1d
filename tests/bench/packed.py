"""The double flow's language model step: one packed pass against two padded forwards, side by side in one run.

    python tests/bench/packed.py [--clips 32] [--batches 3] [--rollout generate] [--rounds 2] [--device cuda]

Clips as long as CMU-MOSEI's (log-normal, mean 7.3 s, sigma 0.6, cut to 1-60 s), 10 audio positions and 3.9 transcript
tokens per second. The obvious way pads the transcripts to one batch and [audio ; prompt ; answer] to another, and runs
the stock model with transformers' sdpa over each. Forward and backward with all weights trained, over a few batches of
unequal draws. Prints the best time of each, their ratio, the difference in loss and gradient, how many positions of the
obvious way are padding, and what share of the packed step attention takes (the time it saves to put the values in place
of attention's output). On a CPU time is processor time, so that others on the machine do not count.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from dist_train.packed import NAME, TextStates, leave_before, pack, spread

MEAN_SECONDS, SIGMA, SHORTEST, LONGEST = 7.3, 0.6, 1.0, 60.0
AUDIO_PER_SECOND, TOKENS_PER_SECOND = 10, 3 * 1.3
PROMPT = 40  # tokens of SDUMC's prompt
LAYERS_READ, LAYER = 4, -4


def lengths(clips: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Audio positions and transcript tokens of each clip."""
    draw = np.random.default_rng(seed).lognormal(np.log(MEAN_SECONDS) - SIGMA**2 / 2, SIGMA, clips)
    seconds = np.clip(draw, SHORTEST, LONGEST)
    return (AUDIO_PER_SECOND * seconds).astype(int), np.ceil(TOKENS_PER_SECOND * seconds).astype(int)


def ragged(counts: np.ndarray, width: int, device: str, dtype: torch.dtype) -> TextStates:
    """Random inputs, padded on the right."""
    mask = torch.arange(int(counts.max())) < torch.from_numpy(counts)[:, None]
    states = torch.randn(*mask.shape, width) * 0.02
    return TextStates(states.to(device, dtype), mask.to(device))


def loss(real: list[Tensor], imagined: Tensor, masks: tuple[Tensor, Tensor], starts: Tensor) -> Tensor:
    """A loss that reads what the fusion network reads: the last layers of the real text, one layer of the answer."""
    text = torch.stack(real).sum(0).float().square().mean(2)
    answered = masks[1] & (torch.arange(masks[1].shape[1], device=starts.device) >= starts[:, None])
    answer = imagined.float().square().mean(2)
    return (text * masks[0]).sum() / masks[0].sum() + (answer * answered).sum() / answered.sum()


def run_packed(model: Any, real: TextStates, simulated: TextStates, starts: Tensor) -> Tensor:
    """One padding-free pass; the simulated text leaves it where its states are read."""
    inputs, segments = pack([real, simulated], len(real.mask))
    states = model(
        inputs_embeds=inputs,
        position_ids=segments.positions,
        attention_mask=inputs.new_empty(0, 0, 0, 0),
        segments=segments,
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    border = sum(segments.upper.lengths)
    return loss(
        [spread(state[0, :border], real.mask) for state in states[-LAYERS_READ:]],
        spread(states[LAYER][0, border:], simulated.mask),
        (real.mask, simulated.mask),
        starts,
    )


def run_padded(model: Any, real: TextStates, simulated: TextStates, starts: Tensor) -> Tensor:
    """Two ordinary forwards."""
    real_states, simulated_states = (
        model(
            inputs_embeds=block.states, attention_mask=block.mask.long(), output_hidden_states=True, use_cache=False
        ).hidden_states
        for block in (real, simulated)
    )
    return loss(list(real_states[-LAYERS_READ:]), simulated_states[LAYER], (real.mask, simulated.mask), starts)


def no_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """The values alone."""
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2), None


def inputs(clips: int, asks: bool, seed: int, hidden: int, device: str) -> tuple[TextStates, TextStates, Tensor]:
    """Real and simulated block of one batch, and the columns from which the answers are read."""
    audio, said = lengths(clips, seed)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    real = ragged(1 + said, hidden, device, dtype)
    simulated = ragged(audio + (PROMPT + said if asks else 0), hidden, device, dtype)
    return real, simulated, torch.from_numpy(audio + PROMPT - 1 if asks else np.zeros_like(audio)).to(device)


def timed(model: Any, run: Callable[..., Tensor], batches: list[Any], device: str) -> tuple[float, list[float]]:
    """Seconds of a forward and backward pass over each batch, and the losses."""
    losses = []
    start = now(device)
    for batch in batches:
        model.zero_grad()
        value = run(model, *batch)
        value.backward()
        losses.append(value.detach())
    return now(device) - start, torch.stack(losses).tolist()


def now(device: str) -> float:
    """A clock in seconds."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=32, help="clips per micro-batch")
    parser.add_argument("--batches", type=int, default=3, help="micro-batches")
    parser.add_argument("--rollout", choices=["generate", "prefix"], default="generate")
    parser.add_argument("--rounds", type=int, default=2, help="rounds; the best of each side counts")
    parser.add_argument("--seed", type=int, default=0, help="of the lengths")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda computes in bf16")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    device, clips, layers = arguments.device, arguments.clips, arguments.layers

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=arguments.hidden,
        intermediate_size=int(arguments.hidden * 2.6875),
        num_hidden_layers=layers,
        num_attention_heads=arguments.hidden // 64,
    )
    stock = LlamaForCausalLM(config).get_decoder().train()
    stock = stock.to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    AttentionInterface.register("none", no_attention)
    ours, bare = copy.deepcopy(stock), copy.deepcopy(stock)
    ours.set_attn_implementation(NAME)
    bare.set_attn_implementation("none")
    for model in (ours, bare):
        leave_before(model.layers[LAYER % (layers + 1) :])
    sides = {"packed": (ours, run_packed), "padded": (stock, run_padded), "bare": (bare, run_packed)}

    asks = arguments.rollout == "generate"
    batches = [inputs(clips, asks, arguments.seed + i, arguments.hidden, device) for i in range(arguments.batches)]
    best: dict[str, float] = {}
    losses: dict[str, list[float]] = {}
    for model, run in sides.values():
        timed(model, run, batches[:1], device)  # the first call pays for allocation
    for _ in range(arguments.rounds):
        for name, (model, run) in sides.items():
            seconds, losses[name] = timed(model, run, batches, device)
            best[name] = min(best.get(name, seconds), seconds)

    masks = [block.mask for real, simulated, _ in batches for block in (real, simulated)]
    needed, taken = sum(int(mask.sum()) for mask in masks), sum(mask.numel() for mask in masks)
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{arguments.batches} x {clips} clips, {arguments.rollout}, {layers} layers of {arguments.hidden}, {where}")
    for name in ("packed", "padded"):
        shown = " ".join(f"{value:.6f}" for value in losses[name])
        print(f"{name:8} {best[name]:8.3f} s  {arguments.batches * clips / best[name]:8.2f} clips/s   losses {shown}")
    apart = max(abs(a / b - 1) for a, b in zip(losses["packed"], losses["padded"], strict=True))
    gradients = [
        torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]) for model in (ours, stock)
    ]
    off = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    print(f"ratio {best['padded'] / best['packed']:.2f}x   relative difference: loss {apart:.1e}, gradient {off:.1e}")
    print(f"positions: {needed} packed, {taken} padded, {1 - needed / taken:.0%} padding; ratio {taken / needed:.2f}x")
    print(f"attention takes {1 - best['bare'] / best['packed']:.0%} of the packed step")


if __name__ == "__main__":
    main()
