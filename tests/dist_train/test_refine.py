"""VGMR against its equations written out clip by clip, and what its values are asked to learn."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dist_train.fusion import FusionNetwork, FusionSettings, FusionWidths
from dist_train.imagination import ImaginationSettings
from dist_train.losses import value_loss, value_spread_loss
from dist_train.missing import Streams, keep_where
from dist_train.packed import TextStates
from dist_train.refine import VGMR, RefineSettings

WIDTHS = FusionWidths(audio=7, text=9, vision=5)
SWITCHES = ("global_value", "channel_values", "agreement", "discrepancy")


def settings(**changes: bool) -> RefineSettings:
    return RefineSettings.model_validate({"kind": "vgmr", "width": 6, **changes})


def clips(count: int) -> list[list[Tensor]]:
    return [[torch.randn(int(torch.randint(1, 9, ())), w, dtype=torch.float64) for w in WIDTHS] for _ in range(count)]


def collate(chosen: list[list[Tensor]], padding: float = 0.0) -> Streams:
    streams = []
    for sequences in zip(*chosen, strict=True):
        mask = pad_sequence([torch.ones(len(x), dtype=torch.bool) for x in sequences], batch_first=True)
        streams.append(TextStates(pad_sequence(list(sequences), batch_first=True, padding_value=padding), mask))
    return Streams(*streams)


def by_the_book(w: dict[str, Tensor], clip: list[Tensor], chosen: RefineSettings) -> list[tuple[Tensor, list[float]]]:
    """METHOD 4, one clip: refined X of each modality, and g and the mean of p."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def mlp(name: str, x: Tensor) -> Tensor:
        x = linear(f"{name}.0", x)
        return linear(f"{name}.2", x * (1 + torch.erf(x / 2**0.5)) / 2)

    projected = [linear(f"refiners.{m}.project", x) for m, x in enumerate(clip)]
    s = [mlp(f"refiners.{m}.evidence", torch.cat([h.mean(0), h.max(0).values])) for m, h in enumerate(projected)]
    found = []
    for m, (x, h) in enumerate(zip(clip, projected, strict=True)):
        name, others = f"refiners.{m}", [s[o] for o in range(3) if o != m]
        parts = [s[m], *others]
        parts += [s[m] * o for o in others] if chosen.agreement else []
        parts += [abs(s[m] - o) for o in others] if chosen.discrepancy else []
        r = mlp(f"{name}.relation", torch.cat([*parts, (others[0] + others[1]) / 2]))
        z = mlp(f"{name}.join", torch.cat([s[m], r]))
        logits, values = mlp(f"{name}.gate_input", x) + linear(f"{name}.gate_projected", h), []
        if chosen.global_value:
            g = linear(f"{name}.value", z).sigmoid()
            logits, values = logits + linear(f"{name}.gate_value", 2 * g - 1), [g.item()]
        if chosen.channel_values:
            p = linear(f"{name}.channels", z).sigmoid()
            logits, values = logits + linear(f"{name}.gate_channels", 2 * p - 1), [*values, p.mean().item()]
        gate = 0.2 + 0.8 * (1 + 0.5 * (2 * logits.sigmoid() - 1))
        assert gate.min() >= 0.6 and gate.max() <= 1.4
        gated = x * gate
        centred = gated - gated.mean(1, keepdim=True)
        found.append((centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt(), values))
    return found


@pytest.mark.parametrize("off", [(), *itertools.combinations(SWITCHES, 1), SWITCHES[:2], SWITCHES])
def test_equals_the_equations_written_out(off: tuple[str, ...]) -> None:
    chosen = settings(**dict.fromkeys(off, False))
    vgmr = VGMR(WIDTHS, chosen).double().eval()
    for name, parameter in vgmr.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    samples = clips(4)
    refined, values = vgmr(collate(samples, padding=30.0))
    for row, clip in enumerate(samples):
        for number, (expected, estimates) in enumerate(by_the_book(vgmr.state_dict(), clip, chosen)):
            found = refined[number].states[row][refined[number].mask[row]]
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
            assert values.estimates[row, number].tolist() == pytest.approx(estimates, abs=1e-9)
    assert values.spread.numel() == (0 if "channel_values" in off else 12)


def network() -> FusionNetwork:
    fusion = FusionNetwork(WIDTHS, FusionSettings(width=8), ImaginationSettings(), refine=settings()).double()
    for parameter in fusion.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return fusion


def test_worth_is_what_the_error_grows_by_without_the_modality() -> None:
    """In training mode, with dropout on: it plays no part."""
    fusion, batch, labels = network().train(), collate(clips(5)), torch.randn(5, dtype=torch.float64)
    dropped = torch.tensor([[False, True, False]] * 5)
    notes = fusion(batch, batch, dropped, labels).notes
    fusion.eval()

    def errors(streams: Streams, flow: int) -> Tensor:
        return (fusion(streams, streams, dropped)[flow].prediction - labels).square()

    for flow, name in enumerate(("complete", "missing")):
        for number in range(3):
            nobody = torch.zeros(5, dtype=torch.bool)
            left = Streams(*(keep_where(x, nobody) if m == number else x for m, x in enumerate(batch)))
            expected = (errors(left, flow) - errors(batch, flow)).float()
            torch.testing.assert_close(notes[f"worth/{name}"][:, number], expected, rtol=1e-4, atol=1e-5)
    assert not any(note.startswith("worth") for note in fusion(batch, batch, dropped, labels).notes)


def test_every_parameter_of_vgmr_learns() -> None:
    fusion, batch = network().train(), collate(clips(6))
    fused = fusion(batch, batch, torch.tensor([[False, True, False]] * 6), torch.randn(6, dtype=torch.float64))
    sum(x.square().sum() for x in (*fused.complete, *fused.missing)).backward()
    assert not [name for name, p in fusion.named_parameters() if p.grad is None or not p.grad.any()]
    assert fused.notes["worth/missing"].grad_fn is None


def test_losses_by_definition() -> None:
    estimates, worth = torch.rand(4, 3, 2, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    total = 0.0
    for i, m, k in itertools.product(range(4), range(3), range(2)):
        target, said = 1 / (1 + math.exp(-worth[i, m].item() / 0.7)), estimates[i, m, k].item()
        total += target * math.log(target / said) + (1 - target) * math.log((1 - target) / (1 - said))
    assert value_loss(estimates, worth, 0.7).item() == pytest.approx(total / 24, rel=1e-3)
    spread = torch.full((4, 3, 1), 0.04, dtype=torch.float64)
    alike = torch.full((4, 3, 2), 0.5, dtype=torch.float64)
    assert value_spread_loss(alike, spread).item() == pytest.approx((1 + 0.6) / 2, abs=1e-3)
    apart = torch.tensor([0.2, 0.8, 0.2, 0.8], dtype=torch.float64)[:, None, None].expand(4, 3, 2)
    assert value_spread_loss(apart, torch.full((4, 3, 1), 0.3)).item() == 0


def test_values_far_out_keep_the_loss_finite() -> None:
    estimates = torch.tensor([[[0.0], [1.0], [0.5]]], requires_grad=True)
    loss = value_loss(estimates, torch.tensor([[1e9, -1e9, 0.0]]), 0.5)
    loss.backward()
    assert loss.isfinite() and estimates.grad is not None and estimates.grad.isfinite().all()
