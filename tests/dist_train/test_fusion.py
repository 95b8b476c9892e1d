from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dist_train.fusion import FlowOutput, FusionNetwork, FusionSettings, FusionWidths, PooledUMCA
from dist_train.imagination import ImaginationSettings
from dist_train.missing import Streams
from dist_train.names import MODALITIES
from dist_train.packed import TextStates

WIDTHS = FusionWidths(audio=10, text=12, vision=6)


TEXT_DROPPED = (False, True, False)


def network(*, enabled: bool = True, lacks: Sequence[str] = ("text",)) -> FusionNetwork:
    imagination = ImaginationSettings(enabled=enabled)
    return FusionNetwork(WIDTHS, FusionSettings(width=16), imagination, lacks).double().eval()


def clips(count: int) -> list[list[Tensor]]:
    """Clips of random lengths, down to one step: three sequences [T, width] each."""
    return [[torch.randn(int(torch.randint(1, 9, ())), w, dtype=torch.float64) for w in WIDTHS] for _ in range(count)]


def collate(chosen: list[list[Tensor]], padding: float = 0.0) -> Streams:
    streams = []
    for sequences in zip(*chosen, strict=True):
        states = pad_sequence(list(sequences), batch_first=True, padding_value=padding)
        mask = pad_sequence([torch.ones(len(x), dtype=torch.bool) for x in sequences], batch_first=True)
        streams.append(TextStates(states, mask))
    return Streams(*streams)


def run(fusion: FusionNetwork, batch: Streams, *, missing: bool, dropped: Sequence[bool] = TEXT_DROPPED) -> FlowOutput:
    """One flow, both reading the same."""
    return fusion(batch, batch, torch.tensor([dropped] * len(batch.audio.mask)))[missing]


def assert_equal(left: FlowOutput, right: FlowOutput) -> None:
    for name, a, b in zip(FlowOutput._fields, left, right, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6), name


def test_size_of_the_paper() -> None:
    fusion = FusionNetwork(FusionWidths(1024, 4096, 1024), FusionSettings(), ImaginationSettings())
    assert sum(p.numel() for p in fusion.parameters()) == 4_268_235


@pytest.mark.parametrize("missing", [False, True])
def test_a_prediction_does_not_depend_on_batch_neighbours(missing: bool) -> None:
    fusion, chosen = network(), clips(7)
    together = run(fusion, collate(chosen, padding=50.0), missing=missing)
    alone = [run(fusion, collate([clip]), missing=missing) for clip in chosen]
    assert_equal(together, FlowOutput(*(torch.cat(parts) for parts in zip(*alone, strict=True))))


@pytest.mark.parametrize("missing", [False, True])
def test_padding_gets_no_gradient(missing: bool) -> None:
    batch = collate(clips(5))
    inputs = [stream.states.requires_grad_() for stream in batch]
    run(network(), batch, missing=missing).prediction.sum().backward()
    for x, (_, mask) in zip(inputs, batch, strict=True):
        assert x.grad is not None and not x.grad[~mask].any()
        assert x.grad[mask].any()


def test_shapes() -> None:
    output = run(network(), collate(clips(3)), missing=True)
    assert [tuple(x.shape) for x in output] == [(3,), (3, 128), (3, 64), (3, 16), (3, 7, 128)]


def test_imagination_acts_in_the_missing_flow_only() -> None:
    batch = collate(clips(4))
    with_mia, without = network(), network(enabled=False)
    without.load_state_dict({k: v for k, v in with_mia.state_dict().items() if "imagination" not in k})
    assert_equal(run(with_mia, batch, missing=False), run(without, batch, missing=False))
    assert_equal(run(without, batch, missing=True), run(without, batch, missing=False))
    assert not torch.allclose(run(with_mia, batch, missing=True).query, run(without, batch, missing=True).query)
    assert not torch.allclose(run(with_mia, batch, missing=True).views, run(without, batch, missing=True).views)


@pytest.mark.parametrize("number", range(3))
def test_each_clip_has_imagined_what_it_lacks_and_nothing_else(number: int) -> None:
    """A clip that lacks one modality comes out as from a network whose only MIA is that of the modality."""
    fusion, batch = network(lacks=MODALITIES), collate(clips(3))
    mixed = fusion(batch, batch, torch.eye(3, dtype=torch.bool).roll(1, 0))[1]
    row = (number + 1) % 3
    alone = network(lacks=MODALITIES[number : number + 1])
    alone.load_state_dict({k: v for k, v in fusion.state_dict().items() if k in alone.state_dict()})
    whole = run(alone, batch, missing=True, dropped=[m == number for m in range(3)])
    for name, a, b in zip(FlowOutput._fields, mixed, whole, strict=True):
        torch.testing.assert_close(a[row], b[row], rtol=0, atol=1e-9, msg=name)
    for flow in (mixed, fusion(batch, batch, torch.zeros(3, 3, dtype=torch.bool))[1]):
        assert torch.allclose(flow.prediction[row], whole.prediction[row]) == (flow is mixed)


def test_every_parameter_learns_in_one_step_of_both_flows() -> None:
    fusion, batch = network(lacks=MODALITIES), collate(clips(6))
    dropped = torch.tensor([[i % 3 == m for m in range(3)] for i in range(6)])
    outputs = [x for flow in fusion(batch, batch, dropped)[:2] for x in flow]
    sum(x.square().sum() for x in outputs).backward()
    assert not [name for name, p in fusion.named_parameters() if p.grad is None or not p.grad.any()]


def test_dropout_draws_per_call_in_training() -> None:
    fusion, batch = network().train(), collate(clips(4))
    assert not torch.equal(run(fusion, batch, missing=False).query, run(fusion, batch, missing=False).query)


def test_bf16_takes_the_softmax_over_time_in_fp32() -> None:
    """bf16 weights of 1,500 steps would lose most of their sum; the pooled vector must stay near float64's."""
    pooling = PooledUMCA(FusionSettings(width=16)).eval().bfloat16()
    torch.nn.init.normal_(pooling.query, std=5)
    sequence = torch.randn(2, 1500, 16).bfloat16()
    mask = torch.ones(2, 1500, dtype=torch.bool)
    pooled = pooling.attend(sequence, mask, pooling.query.expand(2, 1, -1)).squeeze(1)

    key = torch.tanh(pooling.key(sequence)).double()
    weights = (0.3 * key @ pooling.query[0].double()).softmax(dim=1)
    expected = (weights.unsqueeze(-1) * sequence.double()).sum(1)
    # One rounding to bf16 at the end: half a unit in the last of 8 bits.
    torch.testing.assert_close(pooled.double(), expected, rtol=2**-8, atol=1e-6)
