"""The fusion network and its losses against the official SDUMC code, and against METHOD written out step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dist_train.fusion import FlowOutput, FusionNetwork, FusionSettings, FusionWidths
from dist_train.imagination import ImaginationSettings, Skip
from dist_train.losses import LossSettings, double_flow_loss
from dist_train.missing import Streams
from dist_train.packed import TextStates
from tools.convert.sdumc import FUSION, UNUSED, our_name

REFERENCE = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "sdumc_reference.safetensors"
SKIPS: list[Skip] = ["text", "transition"]


def full(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool)


def without_text(clips: int) -> Tensor:
    return torch.tensor([[False, True, False]] * clips)


@pytest.mark.skipif(not REFERENCE.exists(), reason="no reference values of the official code beside the checkout")
@pytest.mark.parametrize("skip", SKIPS)
def test_equals_the_official_code(skip: Skip) -> None:
    reference = load_file(REFERENCE)
    weights = {k.removeprefix("weights."): v for k, v in reference.items() if k.startswith("weights.")}
    audio, vision, labels = (reference[f"in.{name}"] for name in ("audio", "vision", "label"))
    widths = FusionWidths(audio.shape[2], reference["in.text"].shape[2], vision.shape[2])
    fusion = FusionNetwork(widths, FusionSettings(), ImaginationSettings(skip=skip)).eval()
    names = {name: our_name(name) for name in weights if not name.startswith(UNUSED)}
    fusion.load_state_dict(
        {ours.removeprefix(FUSION): weights[name] for name, ours in names.items() if ours}, strict=True
    )

    real, simulated = reference["in.text"], reference["in.simulated"]
    heard, read, imagined, seen = (TextStates(x, full(x)) for x in (audio, real, simulated, vision))
    found = fusion(Streams(heard, read, seen), Streams(heard, imagined, seen), without_text(len(labels)))
    flows = {"complete": found.complete, "missing": found.missing}
    for name, flow in flows.items():
        for field, value in flow._asdict().items():
            official = {"query": "text_query", "views": "text_views"}.get(field, field)
            expected = reference[f"{skip}.out.{name}.{official}"].reshape(value.shape)
            assert torch.allclose(value, expected, rtol=0, atol=1e-5), f"{name} {field}"
    teacher = torch.ones(len(labels), dtype=torch.bool)
    _, terms = double_flow_loss(flows["complete"], flows["missing"], labels, teacher, LossSettings())
    for name, term in terms.items():
        torch.testing.assert_close(term, reference[f"{skip}.loss.{name}"], rtol=0, atol=1e-5)


def fusion_by_the_book(w: dict[str, Tensor], clip: list[Tensor], skip: Skip, *, missing: bool) -> FlowOutput:
    """METHOD 1.2, one clip, one vector at a time. `clip`: audio, text, vision as [T, width] without padding."""

    def linear(name: str, x: Tensor) -> Tensor:
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def mlp(name: str, x: Tensor, layers: int) -> Tensor:
        for layer in range(layers):
            x = linear(f"{name}.{3 * layer}", x).clamp(min=0)
        return x

    def pool(name: str, steps: list[Tensor], query: Tensor) -> Tensor:
        shares = [(0.3 * (torch.tanh(linear(f"{name}.key", x)) @ query)).exp() for x in steps]
        pooled = torch.zeros_like(steps[0])
        for share, x in zip(shares, steps, strict=True):
            pooled = pooled + share / sum(shares) * x
        return pooled

    def imagine(name: str, a: Tensor, t: Tensor, v: Tensor) -> Tensor:
        hidden = linear(f"{name}.transition.0", torch.cat((a, t, v))).clamp(min=0)
        transition = linear(f"{name}.transition.2", hidden)
        block = linear(f"{name}.decoder", linear(f"{name}.encoder", transition))
        return block + (t if skip == "text" else transition)

    # 1, 2: projection and stage 1.
    steps = [[linear(f"projections.{m}", x) for x in clip[m]] for m in range(3)]
    vectors = []
    for m in range(3):
        name = f"pooled_attention.{m}"
        vectors.append(mlp(f"{name}.mlp", pool(name, steps[m], w[f"{name}.query"][0]), 2))
    if missing:  # 3
        vectors[1] = imagine("pooled_imagination.text", *vectors)
    a, t, v = vectors
    # 4, 5: gate and views.
    g = linear("modality_gate.weights", mlp("modality_gate.mlp", torch.cat(vectors), 2))
    mixed = {"avt": g[0] * a + g[1] * t + g[2] * v, "at": g[0] * a + g[1] * t, "tv": g[1] * t + g[2] * v}
    mixed |= {"av": g[0] * a + g[2] * v, "a": a, "t": t, "v": v}
    views = {name: mlp(f"views.{name}", x, 1) for name, x in mixed.items()}
    # 6, 7: stage 2, every view on its own, and the imagination of what it saw of the text.
    seen: list[list[Tensor]] = []
    for view in views.values():
        per_modality = []
        for m in range(3):
            name = f"view_attention.{m}"
            per_modality.append(mlp(f"{name}.mlp", pool(name, steps[m], linear(f"{name}.query", view)), 2))
        if missing:
            per_modality[1] = imagine("views_imagination.text", *per_modality)
        seen.append(per_modality)
    # 8: the first gate's weights again, then the second gate.
    fused = [g[0] * s[0] + g[1] * s[1] + g[2] * s[2] for s in seen]
    h = linear("view_gate.weights", mlp("view_gate.mlp", torch.cat(fused), 2))
    representation = torch.zeros_like(fused[0])
    for weight, x in zip(h, fused, strict=True):
        representation = representation + weight * x
    # 9: heads.
    prediction = linear("head", representation)[0]
    rnc = linear("rnc_head.2", linear("rnc_head.0", representation).clamp(min=0))
    return FlowOutput(prediction, representation, rnc, views["t"], torch.stack([s[1] for s in seen]))


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("skip", SKIPS)
def test_equals_the_method_written_out(skip: Skip, missing: bool) -> None:
    widths = FusionWidths(9, 7, 5)
    fusion = FusionNetwork(widths, FusionSettings(width=12), ImaginationSettings(skip=skip)).double().eval()
    for parameter in fusion.parameters():  # large enough that every path matters
        torch.nn.init.normal_(parameter, std=0.3)
    lengths = [(6, 4, 3), (1, 5, 2), (3, 1, 7)]
    chosen = [
        [torch.randn(t, width, dtype=torch.float64) for t, width in zip(clip, widths, strict=True)] for clip in lengths
    ]
    inputs = []
    for sequences in zip(*chosen, strict=True):
        padded = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
        mask = torch.arange(padded.shape[1]) < torch.tensor([len(x) for x in sequences])[:, None]
        inputs.append(TextStates(padded, mask))
    outputs = fusion(Streams(*inputs), Streams(*inputs), without_text(len(chosen)))[missing]
    for row, clip in enumerate(chosen):
        expected = fusion_by_the_book(fusion.state_dict(), clip, skip, missing=missing)
        for field, value in expected._asdict().items():
            torch.testing.assert_close(getattr(outputs, field)[row], value, rtol=1e-9, atol=1e-9)
